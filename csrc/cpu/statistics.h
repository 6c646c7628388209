// Mean and moment (sum of squared distances from the mean) per channel, gathered in parts by whoever has one in a cache.
#pragma once

#include <type_traits>
#include <vector>

#include "conv_bn_relu_kernels.h"
#include "runtime.h"

namespace atrous::cpu {

template <class T> const NormKernels& norm_kernels() {
  if constexpr (std::is_same_v<T, double>) return table<NormTable>().f64;
  else if constexpr (std::is_same_v<T, bf16>) return table<NormTable>().bf16;
  else return table<NormTable>().f32;
}

// A part is some pixels of all channels; threads take it a few channels at a time. The result depends on the parts and their
// order, not on the threads.
template <class A> class PartialStatistics {
 public:
  explicit PartialStatistics(int64_t channels) : channels_(channels) {}

  // One more part, of so many pixels; room() before any thread takes it.
  int64_t add(int64_t pixels) {
    pixels_.push_back(pixels);
    return static_cast<int64_t>(pixels_.size()) - 1;
  }
  void room() { values_.resize(2 * pixels_.size() * static_cast<size_t>(channels_)); }

  A* mean(int64_t part) { return values_.data() + 2 * part * channels_; }
  A* moment(int64_t part) { return mean(part) + channels_; }

  // The statistics of a part's neighbouring channels, whose pixels lie `at` elements from x.
  void take(int64_t part, int64_t first, int64_t channels, const A* x, const int64_t* at) {
    NormPass pass{};
    pass.rows = pixels_[part];
    pass.channels = channels;
    pass.x = x;
    pass.at = at;
    pass.sum = mean(part) + first;
    pass.product = moment(part) + first;
    norm_kernels<A>().statistics(pass);
  }

  // Chan, Golub & LeVeque's update, part after part, in double: exact enough for any number of parts.
  void merge(A* mean_out, A* moment_out) {
    std::vector<double> means(static_cast<size_t>(channels_)), moments(means);
    double seen = 0;
    for (size_t part = 0; part < pixels_.size(); ++part) {
      if (pixels_[part] == 0) continue;
      const double n = static_cast<double>(pixels_[part]);
      seen += n;
      const double share = n / seen, cross = n * (seen - n) / seen;
      const A *m = mean(static_cast<int64_t>(part)), *q = moment(static_cast<int64_t>(part));
      for (int64_t c = 0; c < channels_; ++c) {
        const double distance = static_cast<double>(m[c]) - means[c];
        means[c] += distance * share;
        moments[c] += static_cast<double>(q[c]) + distance * distance * cross;
      }
    }
    std::copy(means.begin(), means.end(), mean_out);
    std::copy(moments.begin(), moments.end(), moment_out);
  }

 private:
  int64_t channels_;
  std::vector<int64_t> pixels_;
  std::vector<A> values_;  // [part][mean, moment][channel]
};

}  // namespace atrous::cpu
