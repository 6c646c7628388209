// exp and log of whole vectors. Included only by the files of kernels/, after vec.h.

template <class T> using Int = Vec<typename IndexOf<T>::type>;
template <class T> struct WordOf { using type = uint32_t; };
template <> struct WordOf<double> { using type = uint64_t; };
template <class T> using Word = Vec<typename WordOf<T>::type>;  // whose sums may wrap, as those of NaN's bits do

template <class T> struct FloatFormat;
template <> struct FloatFormat<float> {
  static constexpr int fraction_bits = 23, exp_degree = 7, log_terms = 5;
  static constexpr float lowest = -86;           // exp of less is not a normal number
  static constexpr float round = 0x1.8p23f;      // added and taken away: to the nearest integer
  static constexpr float ln2_high = 0x1.63p-1f;  // ten bits: its products with exponents are exact
  static constexpr float ln2_low = -0x1.bd0106p-13f;
};
template <> struct FloatFormat<double> {
  static constexpr int fraction_bits = 52, exp_degree = 13, log_terms = 11;
  static constexpr double lowest = -707;
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e4p-1;
  static constexpr double ln2_low = 0x1.7f7d1cf79abcap-20;
};

constexpr double reciprocal_factorial(int n) { return n < 2 ? 1.0 : reciprocal_factorial(n - 1) / n; }

// exp(x) for x <= 0 (or little above): 2^n * exp(r), |r| <= ln(2)/2, by the Taylor series. Its remainder is 5e-9 (float),
// 5e-18 (double); with the roundings the relative error stays below 2 units in the last place. Below `lowest`, exp(lowest).
template <class T> inline Vec<T> exp_vector(Vec<T> x) {
  using F = FloatFormat<T>;
  x = x < F::lowest ? Vec<T>{} + F::lowest : x;
  const Vec<T> shifted = x * static_cast<T>(1.44269504088896340736) + F::round;
  const Vec<T> n = shifted - F::round;
  const Vec<T> r = (x - n * F::ln2_high) - n * F::ln2_low;
  Vec<T> p = Vec<T>{} + static_cast<T>(reciprocal_factorial(F::exp_degree));
#pragma GCC unroll 16
  for (int k = F::exp_degree - 1; k >= 0; --k) p = p * r + static_cast<T>(reciprocal_factorial(k));
  return (Vec<T>)((Word<T>)p + ((Word<T>)shifted << F::fraction_bits));
}

// log(x) for normal x: x = 2^k * f, f in [sqrt(1/2), sqrt(2)); log f = 2 artanh(t), t = (f - 1) / (f + 1), |t| < 0.172. The
// terms left out are below 1e-9 (float), 2e-19 (double). NaN gives NaN.
template <class T> inline Vec<T> log_vector(Vec<T> x) {
  using F = FloatFormat<T>;
  const Vec<T> half_root = Vec<T>{} + static_cast<T>(0.70710678118654752440);
  const Int<T> k = (Int<T>)((Word<T>)x - (Word<T>)half_root) >> F::fraction_bits;
  const Vec<T> f = (Vec<T>)((Word<T>)x - ((Word<T>)k << F::fraction_bits));
  const Vec<T> t = (f - 1) / (f + 1), square = t * t;
  Vec<T> p{};
#pragma GCC unroll 16
  for (int j = F::log_terms; j >= 0; --j) p = p * square + static_cast<T>(1.0 / (2 * j + 1));
  const Vec<T> exponent = __builtin_convertvector(k, Vec<T>);
  return (exponent * F::ln2_high + (exponent * F::ln2_low + 2 * t * p)) + (x - x);
}
