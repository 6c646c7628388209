"""Every op in plain PyTorch: readable, any dtype, any layout. The truth that the kernels are tested against."""
