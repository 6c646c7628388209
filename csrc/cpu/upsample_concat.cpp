// Input and levels are written straight into their slices of the concatenation: nothing of full size is stored in between.
#include "upsample_concat.h"

#include <algorithm>
#include <cmath>
#include <deque>

#include "pyramid_pool_typed.h"
#include "stream.h"

namespace atrous::cpu {
namespace {

constexpr double operations_per_value = 4;  // of a convolution, that writing one value costs about as much as

// Where an output position reads: low * (1 - weight) + high * weight.
struct Source {
  int64_t low, high;
  double weight;
};

std::vector<Source> sources(int64_t out, int64_t in, bool align_corners) {
  std::vector<Source> all;
  for (int64_t i = 0; i < out; ++i) {
    const double step = align_corners ? (out > 1 ? static_cast<double>(in - 1) / static_cast<double>(out - 1) : 0.0)
                                      : static_cast<double>(in) / static_cast<double>(out);
    const double at = align_corners ? static_cast<double>(i) * step : (static_cast<double>(i) + 0.5) * step - 0.5;
    const double inside = std::clamp(at, 0.0, static_cast<double>(in - 1));
    const int64_t low = std::min(static_cast<int64_t>(inside), in - 1);
    all.push_back({low, std::min(low + 1, in - 1), inside - static_cast<double>(low)});
  }
  return all;
}

template <class S> struct Interpolated {
  using A = Accumulator<S>;
  Level level;
  std::vector<Source> y, x;
  Scratch wide;  // the level in the type that it is computed in; levels are small

  Interpolated(const Level& level, int64_t batch, const Level& to, bool align_corners)
      : level(level),
        y(sources(to.height, level.height, align_corners)),
        x(sources(to.width, level.width, align_corners)),
        wide(static_cast<size_t>(batch * size()) * sizeof(A)) {
    copy_row<S, A>(batch * size(), static_cast<const S*>(level.data), wide.template as<A>());
  }
  int64_t size() const { return level.channels * level.height * level.width; }
};

template <class S>
void concat_nhwc(int64_t batch, const Level& input, const std::deque<Interpolated<S>>& levels, int64_t channels, S* output) {
  using A = Accumulator<S>;
  const int64_t rows = batch * input.height;
  const int64_t level_channels = channels - input.channels, values = rows * input.width * channels;
  int64_t row_values = 0;
  for (const auto& one : levels) row_values += one.level.width * one.level.channels;
  const int64_t threads = threads_for(operations_per_value * static_cast<double>(values));
  parallel(rows, threads, [&](int64_t begin, int64_t end) {
    const Writer writer(values * static_cast<int64_t>(sizeof(S)));
    Scratch scratch(static_cast<size_t>(row_values) * sizeof(A) + static_cast<size_t>(level_channels) * sizeof(S));
    S* const stage = reinterpret_cast<S*>(scratch.as<A>() + row_values);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / input.height, y = task % input.height;
      A* row = scratch.as<A>();
      for (const auto& one : levels) {
        const int64_t size = one.level.width * one.level.channels;
        const A* const image = one.wide.template as<A>() + n * one.size();
        const Source& at = one.y[y];
        pyramid_kernels<A>().blend(size, image + at.low * size, image + at.high * size, static_cast<A>(1 - at.weight),
                                   static_cast<A>(at.weight), row);
        row += size;
      }
      for (int64_t x = 0; x < input.width; ++x) {
        const int64_t pixel = task * input.width + x;
        S* to = output + pixel * channels;
        if (input.data)
          writer.copy(to, static_cast<const S*>(input.data) + pixel * input.channels,
                      input.channels * static_cast<int64_t>(sizeof(S)));
        to += input.channels;
        S* const made = writer.place(to, stage);
        S* slice = made;
        const A* from = scratch.as<A>();
        for (const auto& one : levels) {
          const Source& at = one.x[x];
          const int64_t c = one.level.channels;
          pyramid_kernels<S>().blend(c, from + at.low * c, from + at.high * c, static_cast<A>(1 - at.weight),
                                     static_cast<A>(at.weight), slice);
          from += one.level.width * c;
          slice += c;
        }
        writer.finish(to, made, level_channels);
      }
    }
  });
}

template <class S>
void concat_nchw(int64_t batch, const Level& input, const std::deque<Interpolated<S>>& levels, int64_t channels, S* output) {
  using A = Accumulator<S>;
  const int64_t pixels = input.height * input.width;
  int64_t tallest = 0;
  for (const auto& one : levels) tallest = std::max(tallest, one.level.height);
  const int64_t threads = threads_for(operations_per_value * static_cast<double>(batch * channels * pixels));
  parallel(batch * channels, threads, [&](int64_t begin, int64_t end) {
    const Writer writer(batch * channels * pixels * static_cast<int64_t>(sizeof(S)));
    Scratch scratch(static_cast<size_t>(tallest * input.width) * sizeof(A) + static_cast<size_t>(pixels) * sizeof(S));
    A* const stretched = scratch.as<A>();  // one plane of a level, as wide as the output
    S* const stage = reinterpret_cast<S*>(stretched + tallest * input.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / channels;
      int64_t c = task % channels;
      S* const to = output + task * pixels;
      if (c < input.channels) {
        if (input.data)
          writer.copy(to, static_cast<const S*>(input.data) + (n * input.channels + c) * pixels,
                      pixels * static_cast<int64_t>(sizeof(S)));
        continue;
      }
      c -= input.channels;
      auto one = levels.begin();
      for (; c >= one->level.channels; ++one) c -= one->level.channels;
      const int64_t width = one->level.width;
      const A* const plane = one->wide.template as<A>() + n * one->size() + c * one->level.height * width;
      for (int64_t i = 0; i < one->level.height; ++i)
        for (int64_t x = 0; x < input.width; ++x) {
          const Source& at = one->x[x];
          stretched[i * input.width + x] = plane[i * width + at.low] * static_cast<A>(1 - at.weight) +
                                           plane[i * width + at.high] * static_cast<A>(at.weight);
        }
      S* const made = writer.place(to, stage);
      for (int64_t y = 0; y < input.height; ++y) {
        const Source& at = one->y[y];
        pyramid_kernels<S>().blend(input.width, stretched + at.low * input.width, stretched + at.high * input.width,
                                   static_cast<A>(1 - at.weight), static_cast<A>(at.weight), made + y * input.width);
      }
      writer.finish(to, made, pixels);
    }
  });
}

}  // namespace

void upsample_concat(DType dtype, bool channels_last, int64_t batch, const Level& input, const std::vector<Level>& levels,
                     bool align_corners, void* output) {
  with_type(dtype, [&](auto zero) {
    using S = decltype(zero);
    std::deque<Interpolated<S>> ready;  // a vector would have to move them
    int64_t channels = input.channels;
    for (const Level& level : levels) {
      ready.emplace_back(level, batch, input, align_corners);
      channels += level.channels;
    }
    const auto concat = channels_last ? concat_nhwc<S> : concat_nchw<S>;
    concat(batch, input, ready, channels, static_cast<S*>(output));
  });
}

}  // namespace atrous::cpu
