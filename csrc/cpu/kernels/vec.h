// SIMD in the compiler's own vector types: one source, any width. Included only by the files of kernels/, inside the namespace of
// the instruction set that it is compiled for.

// Bytes per vector register.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int registers = 16;
#else
constexpr int vector_bytes = 16;
constexpr int registers = 16;
#endif

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T unaligned __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> constexpr int lanes = vector_bytes / sizeof(T);

template <class T> inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}
template <class T> inline void store(T* to, Vec<T> v) { *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = v; }

// NaN stays NaN.
template <class T, class V> inline V between(V value, double low, double high) {
  const V least = V{} + static_cast<T>(low), most = V{} + static_cast<T>(high);
  value = value < least ? least : value;
  return value > most ? most : value;
}
// The vector of sums whose first channel is `channel`, to be written to `to`.
template <class T> inline Vec<T> finished(Vec<T> sum, const Finish& by, int64_t channel, const T* to) {
  if (by.scale == nullptr) return sum;
  sum = sum * load(static_cast<const T*>(by.scale) + channel) + load(static_cast<const T*>(by.shift) + channel);
  if (by.residual != 0) sum = sum + load(reinterpret_cast<const T*>(reinterpret_cast<const char*>(to) + by.residual));
  return between<T>(sum, by.low, by.high);
}

// bfloat16 travels as half a vector of 16-bit integers.
typedef uint16_t Half __attribute__((vector_size(vector_bytes / 2)));
typedef uint16_t HalfUnaligned __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));

inline Vec<float> load(const bf16* from) {
  const Half half = *reinterpret_cast<const HalfUnaligned*>(from);
  return (Vec<float>)(__builtin_convertvector(half, Bits) << 16);
}
inline void store(bf16* to, Vec<float> v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Bits result = ((Bits)(v == v) & rounded) | ((Bits)(v != v) & 0x7fc0);
  *reinterpret_cast<HalfUnaligned*>(to) = __builtin_convertvector(result, Half);
}

inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline float value_of(bf16 x) { return to_float(x); }
inline void assign(float* to, float x) { *to = x; }
inline void assign(double* to, double x) { *to = x; }
inline void assign(bf16* to, float x) { *to = to_bf16(x); }

// Square transpose of lanes<T> vectors in registers: at distance d, exchange the off-diagonal blocks of size d.
template <class T> struct IndexOf { using type = int32_t; };
template <> struct IndexOf<double> { using type = int64_t; };

template <int distance, class T> inline void exchange(Vec<T>* v) {
  constexpr int n = lanes<T>;
  using Index = Vec<typename IndexOf<T>::type>;
  Index low, high;
  for (int j = 0; j < n; ++j) {
    low[j] = (j & distance) ? n + j - distance : j;
    high[j] = (j & distance) ? n + j : j + distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & distance) continue;
    const Vec<T> a = v[i], b = v[i + distance];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + distance] = __builtin_shuffle(a, b, high);
  }
}
template <class T> inline void transpose_square(Vec<T>* v) {
  exchange<1, T>(v);
  if constexpr (lanes<T> > 2) exchange<2, T>(v);
  if constexpr (lanes<T> > 4) exchange<4, T>(v);
  if constexpr (lanes<T> > 8) exchange<8, T>(v);
}
