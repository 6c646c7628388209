#include "hard_pixels.h"

#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "runtime.h"

namespace atrous::cpu {
namespace {

constexpr int digit_bits = 11;
constexpr int64_t digits = 1 << digit_bits;
using Histogram = std::array<int64_t, digits>;

template <class T> struct KeyOf { using type = uint32_t; };
template <> struct KeyOf<double> { using type = uint64_t; };

// Integers in the order of the losses; those of numbers are above 0, which stands for a pixel that does not count.
template <class T> typename KeyOf<T>::type key_of(T loss) {
  using Key = typename KeyOf<T>::type;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  if (std::isnan(loss)) loss = std::numeric_limits<T>::infinity();
  const Key bits = std::bit_cast<Key>(loss + T{0});  // -0 becomes 0
  return bits & sign ? static_cast<Key>(~bits) : bits | sign;
}

// A radix selection: the digits of the smallest key that is kept are found from the top, each by a histogram of the keys that
// share the digits above it. Keys lie where the losses lay.
template <class T, class From>
void run(T* loss, const From* labels, int64_t pixels, int64_t ignore_index, double fraction) {
  using Key = typename KeyOf<T>::type;
  const auto key_at = [loss](int64_t i) { return std::bit_cast<Key>(loss[i]); };
  const int64_t parts = threads_for(16.0 * static_cast<double>(pixels));
  std::vector<Histogram> histograms(parts);
  const auto each_part = [&](const auto& body) {
    parallel(parts, parts, [&](int64_t part, int64_t end) {
      for (; part < end; ++part) body(pixels * part / parts, pixels * (part + 1) / parts, histograms[part]);
    });
  };

  int shift = std::max(0, static_cast<int>(8 * sizeof(Key)) - digit_bits);
  each_part([&](int64_t begin, int64_t end, Histogram& histogram) {
    histogram.fill(0);
    for (int64_t i = begin; i < end; ++i) {
      const Key key = labels[i] == ignore_index ? Key{0} : key_of(loss[i]);
      loss[i] = std::bit_cast<T>(key);
      ++histogram[key >> shift];
      if (key == 0) --histogram[0];
    }
  });
  int64_t counted = 0;
  for (const Histogram& histogram : histograms)
    for (const int64_t count : histogram) counted += count;

  // Left to be found among the keys with the digits of `smallest`.
  int64_t left = static_cast<int64_t>(std::ceil(fraction * static_cast<double>(counted)));
  Key smallest = 0;
  int bits = digit_bits;
  std::vector<int64_t> ties(parts);
  while (left > 0) {
    int64_t digit = (int64_t{1} << bits) - 1;
    for (;; --digit) {
      int64_t count = 0;
      for (int64_t part = 0; part < parts; ++part) count += ties[part] = histograms[part][digit];
      if (count >= left) break;
      left -= count;
    }
    smallest |= static_cast<Key>(digit) << shift;
    if (shift == 0) break;
    const int above = shift;
    bits = std::min(digit_bits, shift);
    shift -= bits;
    const Key mask = (Key{1} << bits) - 1;
    each_part([&](int64_t begin, int64_t end, Histogram& histogram) {
      histogram.fill(0);
      for (int64_t i = begin; i < end; ++i)
        if (const Key key = key_at(i); key >> above == smallest >> above) ++histogram[key >> shift & mask];
    });
  }
  if (left == 0) smallest = std::numeric_limits<Key>::max();  // no number's key

  // The first ones of equal losses, part by part.
  std::vector<int64_t> taken(parts);
  for (int64_t part = 0; part < parts; ++part) {
    taken[part] = std::min(left, ties[part]);
    left -= taken[part];
  }
  each_part([&](int64_t begin, int64_t end, const Histogram& histogram) {
    int64_t ties_left = taken[&histogram - histograms.data()];
    for (int64_t i = begin; i < end; ++i) {
      const Key key = key_at(i);
      const bool tie = key == smallest;
      loss[i] = static_cast<T>(key > smallest || (tie && ties_left > 0));
      ties_left -= tie;
    }
  });
}

template <class T> void run_labels(T* loss, const void* labels, LabelType type, int64_t pixels, int64_t ignored, double fraction) {
  switch (type) {
    case LabelType::uint8: return run(loss, static_cast<const uint8_t*>(labels), pixels, ignored, fraction);
    case LabelType::int32: return run(loss, static_cast<const int32_t*>(labels), pixels, ignored, fraction);
    default: return run(loss, static_cast<const int64_t*>(labels), pixels, ignored, fraction);
  }
}

}  // namespace

void hard_pixels(void* loss, DType dtype, const void* labels, LabelType label_type, int64_t pixels, int64_t ignore_index,
                 double fraction) {
  if (dtype == DType::float64) return run_labels(static_cast<double*>(loss), labels, label_type, pixels, ignore_index, fraction);
  return run_labels(static_cast<float*>(loss), labels, label_type, pixels, ignore_index, fraction);
}

}  // namespace atrous::cpu
