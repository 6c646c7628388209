// Compiled once per instruction set: CMake sets the compiler flags, ATROUS_ISA (a namespace) and ATROUS_ISA_NAME.
#include "cpu/conv_bn_relu_kernels.h"

namespace atrous::cpu {
namespace {
namespace ATROUS_ISA {

#include "vec.h"

// A vector of elements, and a single one for what is left at the end of a row: the same body runs on both.
template <class T> struct Wide {
  using A = Accumulator<T>;
  using V = Vec<A>;
  static constexpr int width = lanes<A>;
  static V get(const T* from) { return load(from); }
  static V sums(const A* from) { return load(from); }
  static V all(A x) { return x - V{}; }
  static void put(T* to, V v) { store(to, v); }
  static void put_sums(A* to, V v) { store(to, v); }
};
template <class T> struct Single {
  using A = Accumulator<T>;
  using V = A;
  static constexpr int width = 1;
  static V get(const T* from) { return value_of(*from); }
  static V sums(const A* from) { return *from; }
  static V all(A x) { return x; }
  static void put(T* to, V v) { assign(to, v); }
  static void put_sums(A* to, V v) { *to = v; }
};

template <class T, class Body> inline void along(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Wide<T>::width <= size; i += Wide<T>::width) body(Wide<T>{}, i);
  for (; i < size; ++i) body(Single<T>{}, i);
}

// y, and whether it is free: neither held at low nor at high. Comparisons keep NaN, and let its gradient through.
template <class V> inline V normalised(V x, V mean, V scale, V shift) { return (x - mean) * scale + shift; }
template <class V> inline V held(V y, V low, V high) {
  y = y <= low ? low : y;
  return y >= high ? high : y;
}
template <class V> inline V free_gradient(V grad, V y, V low, V high) {
  grad = y <= low ? V{} : grad;
  return y >= high ? V{} : grad;
}

// NHWC -----------------------------------------------------------------------------------------------------------------

// Rows that share one read and one write of the running sums.
constexpr int64_t together = 4;
struct Many {
  static constexpr int64_t count = together;
};
struct One {
  static constexpr int64_t count = 1;
};

// sum[c] += body(row, c) for every row.
template <class T, class Body> inline void add_rows(const NormPass& p, Accumulator<T>* sum, const Body& body) {
  int64_t row = 0;
  for (; row + together <= p.rows; row += together)
    along<T>(p.channels, [&](auto lane, int64_t c) {
      const auto ab = body(lane, row, c) + body(lane, row + 1, c), cd = body(lane, row + 2, c) + body(lane, row + 3, c);
      lane.put_sums(sum + c, lane.sums(sum + c) + (ab + cd));
    });
  for (; row < p.rows; ++row)
    along<T>(p.channels, [&](auto lane, int64_t c) { lane.put_sums(sum + c, lane.sums(sum + c) + body(lane, row, c)); });
}

template <class A> inline void clear(int64_t size, A* sum) {
  for (int64_t i = 0; i < size; ++i) sum[i] = 0;
}

template <class T> void statistics(const NormPass& p) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(p.x);
  A *mean = static_cast<A*>(p.sum), *moment = static_cast<A*>(p.product);
  clear(p.channels, mean);
  clear(p.channels, moment);
  const auto of_row = [&](int64_t row) { return x + (p.at == nullptr ? row * p.channels : p.at[row]); };
  add_rows<T>(p, mean, [&](auto lane, int64_t row, int64_t c) { return lane.get(of_row(row) + c); });
  for (int64_t c = 0; c < p.channels; ++c) mean[c] /= static_cast<A>(p.rows);
  add_rows<T>(p, moment, [&](auto lane, int64_t row, int64_t c) {
    const auto d = lane.get(of_row(row) + c) - lane.sums(mean + c);
    return d * d;
  });
}

template <class T> void apply(const NormPass& p) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const A *mean = static_cast<const A*>(p.mean), *scale = static_cast<const A*>(p.scale),
          *shift = static_cast<const A*>(p.shift);
  const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
  const T* residual = static_cast<const T*>(p.residual);
  for (int64_t row = 0; row < p.rows; ++row, x += p.channels, out += p.channels) {
    const auto y = [&](auto lane, int64_t c) {
      return normalised(lane.get(x + c), lane.sums(mean + c), lane.sums(scale + c), lane.sums(shift + c));
    };
    const auto put = [&](auto lane, int64_t c, auto v) { lane.put(out + c, held(v, lane.all(low), lane.all(high))); };
    if (residual == nullptr) {
      along<T>(p.channels, [&](auto lane, int64_t c) { put(lane, c, y(lane, c)); });
    } else {
      along<T>(p.channels, [&](auto lane, int64_t c) { put(lane, c, y(lane, c) + lane.get(residual + c)); });
      residual += p.channels;
    }
  }
}

template <class T> void sums(const NormPass& p) {
  using A = Accumulator<T>;
  const T *all_x = static_cast<const T*>(p.x), *all_grad = static_cast<const T*>(p.grad);
  const A *mean = static_cast<const A*>(p.mean), *scale = static_cast<const A*>(p.scale),
          *shift = static_cast<const A*>(p.shift);
  const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
  A *sum = static_cast<A*>(p.sum), *product = static_cast<A*>(p.product);
  clear(p.channels, sum);
  clear(p.channels, product);
  const auto add = [&](int64_t row, auto rows) {
    along<T>(p.channels, [&](auto lane, int64_t c) {
      const auto m = lane.sums(mean + c), s = lane.sums(scale + c), b = lane.sums(shift + c);
      auto first = lane.sums(sum + c), second = lane.sums(product + c);
#pragma GCC unroll 4
      for (int64_t i = 0; i < decltype(rows)::count; ++i) {
        const int64_t at = (row + i) * p.channels + c;
        const auto x = lane.get(all_x + at);
        const auto g = free_gradient(lane.get(all_grad + at), normalised(x, m, s, b), lane.all(low), lane.all(high));
        first += g;
        second += g * (x - m);
      }
      lane.put_sums(sum + c, first);
      lane.put_sums(product + c, second);
    });
  };
  int64_t row = 0;
  for (; row + together <= p.rows; row += together) add(row, Many{});
  for (; row < p.rows; ++row) add(row, One{});
}

template <class T> void input_gradient(const NormPass& p) {
  using A = Accumulator<T>;
  const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
  T* out = static_cast<T*>(p.out);
  const A *mean = static_cast<const A*>(p.mean), *scale = static_cast<const A*>(p.scale),
          *shift = static_cast<const A*>(p.shift), *slope = static_cast<const A*>(p.slope),
          *offset = static_cast<const A*>(p.offset);
  const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
  for (int64_t row = 0; row < p.rows; ++row, x += p.channels, grad += p.channels, out += p.channels)
    along<T>(p.channels, [&](auto lane, int64_t c) {
      const auto v = lane.get(x + c), m = lane.sums(mean + c), s = lane.sums(scale + c);
      const auto y = normalised(v, m, s, lane.sums(shift + c));
      const auto g = free_gradient(lane.get(grad + c), y, lane.all(low), lane.all(high));
      lane.put(out + c, g * s + (v - m) * lane.sums(slope + c) + lane.sums(offset + c));
    });
}

// NCHW: one plane ------------------------------------------------------------------------------------------------------

template <class T> inline Accumulator<T> one(const void* value) { return *static_cast<const Accumulator<T>*>(value); }

// Sums a value, or a pair of them, over the plane: four vectors of partial sums, added in a fixed order.
template <class T> struct PlaneSum {
  using A = Accumulator<T>;
  Vec<A> parts[4] = {};
  A rest = 0;
  void add(int64_t part, Vec<A> v) { parts[part] += v; }
  void add(int64_t, A v) { rest += v; }
  A total() const {
    const Vec<A> v = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    A sum = rest;
    for (int i = 0; i < lanes<A>; ++i) sum += v[i];
    return sum;
  }
};

// As along(), four vectors at a time so that PlaneSum's parts stay in registers.
template <class T, class Body> inline void along_plane(int64_t size, const Body& body) {
  constexpr int64_t width = Wide<T>::width;
  int64_t i = 0;
  for (; i + 4 * width <= size; i += 4 * width) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) body(Wide<T>{}, i + j * width, j);
  }
  for (; i + width <= size; i += width) body(Wide<T>{}, i, 0);
  for (; i < size; ++i) body(Single<T>{}, i, 0);
}

template <class T> void statistics_plane(const NormPass& p) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(p.x);
  PlaneSum<T> sum, moment;
  along_plane<T>(p.channels, [&](auto lane, int64_t i, int64_t j) { sum.add(j, lane.get(x + i)); });
  const A mean = sum.total() / static_cast<A>(p.channels);
  along_plane<T>(p.channels, [&](auto lane, int64_t i, int64_t j) {
    const auto d = lane.get(x + i) - lane.all(mean);
    moment.add(j, d * d);
  });
  *static_cast<A*>(p.sum) = mean;
  *static_cast<A*>(p.product) = moment.total();
}

template <class T> void apply_plane(const NormPass& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  using A = Accumulator<T>;
  const A mean = one<T>(p.mean), scale = one<T>(p.scale), shift = one<T>(p.shift);
  const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
  const T* residual = static_cast<const T*>(p.residual);
  const auto y = [&](auto lane, int64_t i) {
    return normalised(lane.get(x + i), lane.all(mean), lane.all(scale), lane.all(shift));
  };
  const auto put = [&](auto lane, int64_t i, auto v) { lane.put(out + i, held(v, lane.all(low), lane.all(high))); };
  if (residual == nullptr) along<T>(p.channels, [&](auto lane, int64_t i) { put(lane, i, y(lane, i)); });
  else along<T>(p.channels, [&](auto lane, int64_t i) { put(lane, i, y(lane, i) + lane.get(residual + i)); });
}

template <class T> void sums_plane(const NormPass& p) {
  using A = Accumulator<T>;
  const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
  const A mean = one<T>(p.mean), scale = one<T>(p.scale), shift = one<T>(p.shift);
  const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
  PlaneSum<T> sum, product;
  along_plane<T>(p.channels, [&](auto lane, int64_t i, int64_t j) {
    const auto v = lane.get(x + i);
    const auto y = normalised(v, lane.all(mean), lane.all(scale), lane.all(shift));
    const auto g = free_gradient(lane.get(grad + i), y, lane.all(low), lane.all(high));
    sum.add(j, g);
    product.add(j, g * (v - lane.all(mean)));
  });
  *static_cast<A*>(p.sum) = sum.total();
  *static_cast<A*>(p.product) = product.total();
}

template <class T> void input_gradient_plane(const NormPass& p) {
  const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
  T* out = static_cast<T*>(p.out);
  using A = Accumulator<T>;
  const A mean = one<T>(p.mean), scale = one<T>(p.scale), shift = one<T>(p.shift);
  const A slope = one<T>(p.slope), offset = one<T>(p.offset);
  const A low = static_cast<A>(p.low), high = static_cast<A>(p.high);
  along<T>(p.channels, [&](auto lane, int64_t i) {
    const auto v = lane.get(x + i);
    const auto y = normalised(v, lane.all(mean), lane.all(scale), lane.all(shift));
    const auto g = free_gradient(lane.get(grad + i), y, lane.all(low), lane.all(high));
    lane.put(out + i, g * lane.all(scale) + (v - lane.all(mean)) * lane.all(slope) + lane.all(offset));
  });
}

template <class T> NormKernels norm_kernels() {
  return {statistics<T>,       apply<T>,       sums<T>,       input_gradient<T>,
          statistics_plane<T>, apply_plane<T>, sums_plane<T>, input_gradient_plane<T>};
}

NormTable make_norm_table() { return {norm_kernels<float>(), norm_kernels<double>(), norm_kernels<bf16>()}; }

}  // namespace ATROUS_ISA
}  // namespace

ATROUS_DEFINE_TABLE(NormTable, make_norm_table)

}  // namespace atrous::cpu
