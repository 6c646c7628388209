// The dense microkernels: a tile of accumulators stays in registers while taps and channels stream past.
// Included only by the files of kernels/, inside the namespace of the instruction set that it is compiled for.

// How one step of depth is multiplied. A is what one row contributes to a step, read at any alignment.
template <class T> struct Product {
  using Acc = T;
  using A = T;
  using B = T;
  static constexpr int b_per_vector = lanes<T>;
  static Vec<T> broadcast(const char* a) {
    T value;
    __builtin_memcpy(&value, a, sizeof value);
    return Vec<T>{} + value;
  }
  static Vec<T> load_b(const B* b) { return load(b); }
  static Vec<T> multiply_add(Vec<T> c, Vec<T> a, Vec<T> b) { return c + a * b; }
};

#if defined(__AVX512BF16__)
// Pairs of channels: the machine adds both products of a pair to one float.
struct PairProduct {
  using Acc = float;
  using A = uint32_t;
  using B = bf16;
  static constexpr int b_per_vector = 2 * lanes<float>;
  static __m512i broadcast(const char* a) {
    uint32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return _mm512_set1_epi32(static_cast<int>(pair));
  }
  static __m512i load_b(const bf16* b) { return _mm512_loadu_si512(b); }
  static Vec<float> multiply_add(Vec<float> c, __m512i a, __m512i b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class P, int vectors, int rows> void matmul(const MatmulTile& tile) {
  using Acc = typename P::Acc;
  constexpr int width = lanes<Acc>;
  // By the time that the sums are ready, the lines they go to have arrived.
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const char* to = static_cast<const char*>(tile.c[i]) + j * vector_bytes;
      __builtin_prefetch(to, 1);
      if (tile.finish.residual != 0) __builtin_prefetch(to + tile.finish.residual);
    }
  }
  Vec<Acc> c[rows][vectors] = {};
  for (int64_t tap = 0; tap < tile.taps; ++tap) {
    const char* a[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) a[i] = tile.a[i] + tile.a_offset[tap];
    const auto* b = static_cast<const typename P::B*>(tile.b[tap]);
    for (int64_t k = 0; k < tile.depth; ++k, b += vectors * P::b_per_vector) {
      decltype(P::load_b(b)) b_row[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) b_row[j] = P::load_b(b + j * P::b_per_vector);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const auto value = P::broadcast(a[i] + k * static_cast<int64_t>(sizeof(typename P::A)));
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) c[i][j] = P::multiply_add(c[i][j], value, b_row[j]);
      }
    }
  }

  const Acc* bias = static_cast<const Acc*>(tile.bias);
  const bool whole = tile.columns == vectors * width;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    Acc* to = static_cast<Acc*>(tile.c[i]);
    const Acc* add = bias ? bias : to;
    Acc row[vectors * width];
    if (!whole) {
      for (int64_t j = 0; j < vectors * width; ++j) row[j] = j < tile.columns ? add[j] : Acc{0};
      add = row;
    }
    Acc* into = whole ? to : row;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      store(into + j * width, finished<Acc>(c[i][j] + load(add + j * width), tile.finish, j * width, to + j * width));
    if (!whole)
      for (int64_t j = 0; j < tile.columns; ++j) to[j] = row[j];
  }
}

// rows * vectors accumulators, one row of b and a broadcast value have to fit the registers.
constexpr int rows_for(int vectors) {
  const int rows = (registers - 2 - vectors) / vectors;
  return rows < max_rows ? rows : max_rows;
}

template <class P, int vectors, int rows> void fill_rows(MatmulKernels& kernels) {
  kernels.kernel[vectors][rows] = matmul<P, vectors, rows>;
  if constexpr (rows > 1) fill_rows<P, vectors, rows - 1>(kernels);
}
template <class P> MatmulKernels matmul_kernels(int depth_channels) {
  constexpr int widest = registers == 32 ? 4 : 2;
  MatmulKernels kernels{};
  kernels.lanes = lanes<typename P::Acc>;
  kernels.depth_channels = depth_channels;
  kernels.vectors = widest;
  kernels.rows_of[1] = rows_for(1);
  fill_rows<P, 1, rows_for(1)>(kernels);
  kernels.rows_of[2] = rows_for(2);
  fill_rows<P, 2, rows_for(2)>(kernels);
  if constexpr (widest == 4) {
    kernels.rows_of[3] = rows_for(3);
    fill_rows<P, 3, rows_for(3)>(kernels);
    kernels.rows_of[4] = rows_for(4);
    fill_rows<P, 4, rows_for(4)>(kernels);
  }
  return kernels;
}

// Weight gradient: rank-1 updates over pixels. Both operands advance by a constant step, so rows need no pointers.
template <class T, int vectors, int rows> void outer(const OuterTile& tile) {
  constexpr int width = lanes<T>;
  Vec<T> c[rows][vectors] = {};
  for (int64_t y = 0; y < tile.rows; ++y) {
    const T* a = static_cast<const T*>(tile.a) + y * tile.a_row;
    const T* b = static_cast<const T*>(tile.b) + y * tile.b_row;
    for (int64_t x = 0; x < tile.columns; ++x, a += tile.a_column, b += tile.b_column) {
      Vec<T> b_row[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) b_row[j] = load(b + j * width);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) c[i][j] = c[i][j] + a[i] * b_row[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    T* to = static_cast<T*>(tile.c) + i * tile.c_row;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(to + j * width, load(to + j * width) + c[i][j]);
  }
}

template <class T> OuterKernels outer_kernels() {
  constexpr int rows = 6, widest = registers == 32 ? 4 : 2;
  OuterKernels kernels{lanes<T>, rows, widest, {}};
  kernels.kernel[1] = outer<T, 1, rows>;
  kernels.kernel[2] = outer<T, 2, rows>;
  if constexpr (widest == 4) {
    kernels.kernel[3] = outer<T, 3, rows>;
    kernels.kernel[4] = outer<T, 4, rows>;
  }
  return kernels;
}
