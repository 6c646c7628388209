// What csrc/cuda/*_ops.cpp need to run with the emulated kernels on CPU tensors: schemas under a name of its own,
// and the two things that only a CUDA build of the framework can do. The library is linked with -Bsymbolic, so that
// these definitions are used by this library alone.
#include <torch/csrc/stable/library.h>

#include <cstdint>

extern "C" {

// What the tests look at: device guards, the device of the last one, and questions for a stream without a guard of its device.
int64_t binding_guards_opened = 0, binding_guards_closed = 0, binding_guarded_device = -2, binding_unguarded_streams = 0;
void* binding_stream = nullptr;

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  ++binding_guards_opened;
  binding_guarded_device = device;
  *guard = reinterpret_cast<DeviceGuardHandle>(&binding_guards_opened);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  ++binding_guards_closed;
  return 0;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (binding_guards_opened == binding_guards_closed || binding_guarded_device != device) ++binding_unguarded_streams;
  *stream = binding_stream;
  return 0;
}

}  // extern "C"

STABLE_TORCH_LIBRARY(ATROUS_NAMESPACE, m) {
  const char* const geometry = "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor";
  for (const std::string kind : {"", "_tensor_core"}) {
    m.def(("conv2d" + kind + "(Tensor input, Tensor weight, Tensor? bias, " + geometry).c_str());
    m.def(("conv2d_input" + kind + "(int[] input_size, Tensor weight, Tensor grad_output, " + geometry).c_str());
    m.def(("conv2d_weight" + kind + "(Tensor input, int[] weight_size, Tensor grad_output, " + geometry).c_str());
  }
  m.def("pyramid_pool(Tensor input, int[] bins, bool maximum) -> (Tensor, Tensor)");
  m.def("pyramid_pool_input(Tensor grad, Tensor index, int[] input_size, int[] bins, bool maximum, bool channels_last)"
        " -> Tensor");
  m.def("permutohedral_lattice(Tensor features) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  const std::string lattice = "Tensor vertices, Tensor weights, Tensor neighbours, Tensor begin, Tensor points, "
                              "Tensor point_weights, bool reverse) -> Tensor";
  m.def(("permutohedral_filter(Tensor values, " + lattice).c_str());
  m.def(("permutohedral_filter_weights(Tensor grad, Tensor values, " + lattice).c_str());
  m.def("upsample_argmax(Tensor logits, int[] size, bool align_corners) -> Tensor");
  m.def("upsample_cross_entropy(Tensor logits, Tensor target, Tensor weight, Tensor? scale, int ignore_index, "
        "float label_smoothing, bool align_corners, bool per_pixel, bool with_gradient) -> (Tensor, Tensor, Tensor)");
}
