// How the passes of conv_bn_relu_kernels.h cover a tensor: pieces that fit the cache, fixed by the problem.
#include "conv_bn_relu.h"

#include <algorithm>
#include <type_traits>

#include "statistics.h"

namespace atrous::cpu {
namespace {

// A piece is read twice by the statistics: it stays in the second-level cache in between.
constexpr int64_t piece_bytes = 128 << 10;
// Sums within a piece are plain single precision: no more rows than this keep their error at a few units.
constexpr int64_t piece_rows = 1024;

template <class T, class P> P* step(P* data, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return data == nullptr ? nullptr : reinterpret_cast<Byte*>(data) + elements * static_cast<int64_t>(sizeof(T));
}

// The tensor as equal stretches (all pixels, or one plane per image and channel), each cut into pieces.
template <class T> struct Pieces {
  const NormShape& s;
  int64_t stretches, length, unit, count;  // length and unit in rows or pixels; count of pieces in all

  explicit Pieces(const NormShape& shape) : s(shape) {
    const int64_t size = sizeof(T);
    if (s.channels_last) {
      stretches = 1;
      length = s.batch * s.pixels;
      unit = std::clamp<int64_t>(piece_bytes / (s.channels * size), 1, piece_rows);
    } else {
      stretches = s.batch * s.channels;
      length = s.pixels;
      unit = piece_bytes / size;
    }
    count = stretches * per_stretch();
  }
  int64_t per_stretch() const { return (length + unit - 1) / unit; }

  // body(pass, parts row, channel): pass at the piece; parts row and channel say where its sums belong.
  template <class Body> void run(const NormPass& whole, const Body& body) const {
    using A = Accumulator<T>;
    const double operations = 4.0 * static_cast<double>(stretches * length * (s.channels_last ? s.channels : 1));
    parallel(count, threads_for(operations), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t stretch = piece / per_stretch(), part = piece % per_stretch();
        const int64_t first = part * unit, size = std::min(unit, length - first);
        const int64_t channel = s.channels_last ? 0 : stretch % s.channels;
        const int64_t image = s.channels_last ? 0 : stretch / s.channels;
        const int64_t at = s.channels_last ? first * s.channels : stretch * length + first;
        NormPass pass = whole;
        pass.rows = s.channels_last ? size : 1;
        pass.channels = s.channels_last ? s.channels : size;
        pass.x = step<T>(pass.x, at);
        pass.residual = step<T>(pass.residual, at);
        pass.grad = step<T>(pass.grad, at);
        pass.out = step<T>(pass.out, at);
        for (const void** parameter : {&pass.mean, &pass.scale, &pass.shift, &pass.slope, &pass.offset})
          *parameter = step<A>(*parameter, channel);
        body(pass, image * per_stretch() + part, channel);
      }
    });
  }

  // Rows of partial sums, and how many elements one of them stands for.
  int64_t parts() const { return s.channels_last ? per_stretch() : s.batch * per_stretch(); }
  int64_t elements_of(int64_t part) const {
    const int64_t first = part % per_stretch() * unit;
    return std::min(unit, length - first);
  }
};

template <class T> void statistics(const NormShape& s, const void* x, void* mean_out, void* moment_out) {
  using A = Accumulator<T>;
  const Pieces<T> pieces(s);
  PartialStatistics<A> partial(s.channels);
  for (int64_t part = 0; part < pieces.parts(); ++part) partial.add(pieces.elements_of(part));
  partial.room();
  NormPass whole{};
  whole.x = x;
  const auto kernel = s.channels_last ? norm_kernels<T>().statistics : norm_kernels<T>().statistics_plane;
  pieces.run(whole, [&](NormPass& pass, int64_t part, int64_t channel) {
    pass.sum = partial.mean(part) + channel;
    pass.product = partial.moment(part) + channel;
    kernel(pass);
  });
  partial.merge(static_cast<A*>(mean_out), static_cast<A*>(moment_out));
}

template <class T>
void sums(const NormShape& s, const NormPass& whole, void* sum_out, void* product_out) {
  using A = Accumulator<T>;
  const Pieces<T> pieces(s);
  const Scratch partial(2 * pieces.parts() * s.channels * sizeof(A));
  A *part_sum = partial.as<A>(), *part_product = part_sum + pieces.parts() * s.channels;
  const auto kernel = s.channels_last ? norm_kernels<T>().sums : norm_kernels<T>().sums_plane;
  pieces.run(whole, [&](NormPass& pass, int64_t part, int64_t channel) {
    pass.sum = part_sum + part * s.channels + channel;
    pass.product = part_product + part * s.channels + channel;
    kernel(pass);
  });
  const Scratch memory(2 * s.channels * sizeof(double));
  double *sum = memory.as<double>(), *product = sum + s.channels;
  std::fill(sum, sum + 2 * s.channels, 0.0);
  for (int64_t part = 0; part < pieces.parts(); ++part) {
    for (int64_t c = 0; c < s.channels; ++c) {
      sum[c] += static_cast<double>(part_sum[part * s.channels + c]);
      product[c] += static_cast<double>(part_product[part * s.channels + c]);
    }
  }
  std::copy(sum, sum + s.channels, static_cast<A*>(sum_out));
  std::copy(product, product + s.channels, static_cast<A*>(product_out));
}

template <class T> void elementwise(const NormShape& s, const NormPass& whole) {
  const NormKernels& k = norm_kernels<T>();
  const auto kernel = whole.grad == nullptr ? (s.channels_last ? k.apply : k.apply_plane)
                                            : (s.channels_last ? k.input_gradient : k.input_gradient_plane);
  Pieces<T>(s).run(whole, [&](NormPass& pass, int64_t, int64_t) { kernel(pass); });
}

template <class Body> void by_type(DType dtype, const Body& body) {
  if (dtype == DType::float64) body(double{});
  else if (dtype == DType::bfloat16) body(bf16{});
  else body(float{});
}

NormPass pass_of(const NormParameters& p) {
  NormPass pass{};
  pass.mean = p.mean;
  pass.scale = p.scale;
  pass.shift = p.shift;
  pass.low = p.low;
  pass.high = p.high;
  return pass;
}

}  // namespace

void norm_statistics(const NormShape& shape, DType dtype, const void* x, void* mean, void* moment) {
  by_type(dtype, [&](auto type) { statistics<decltype(type)>(shape, x, mean, moment); });
}

void norm_apply(const NormShape& shape, DType dtype, const NormParameters& parameters, const void* x, const void* residual,
                void* out) {
  NormPass pass = pass_of(parameters);
  pass.x = x;
  pass.residual = residual;
  pass.out = out;
  by_type(dtype, [&](auto type) { elementwise<decltype(type)>(shape, pass); });
}

void norm_sums(const NormShape& shape, DType dtype, const NormParameters& parameters, const void* grad, const void* x,
               void* sum, void* product) {
  NormPass pass = pass_of(parameters);
  pass.x = x;
  pass.grad = grad;
  by_type(dtype, [&](auto type) { sums<decltype(type)>(shape, pass, sum, product); });
}

void norm_input_gradient(const NormShape& shape, DType dtype, const NormParameters& parameters, const void* slope,
                         const void* offset, const void* grad, const void* x, void* out) {
  NormPass pass = pass_of(parameters);
  pass.slope = slope;
  pass.offset = offset;
  pass.x = x;
  pass.grad = grad;
  pass.out = out;
  by_type(dtype, [&](auto type) { elementwise<decltype(type)>(shape, pass); });
}

}  // namespace atrous::cpu
