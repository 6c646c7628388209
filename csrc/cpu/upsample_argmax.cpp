#include "upsample_argmax.h"

namespace atrous::cpu {
namespace {

template <class T> void run(const UpsampleShape& s, ConstTensor logits, int64_t* out) {
  const UpsampleGrid<T> grid(s);
  const UpsampleAxis<T> axis(s.in_h, s.out_h, s.align_corners);
  const auto& kernels = upsample_kernels<T>();
  const int64_t lanes = kernels.lanes;
  const double work = 4.0 * static_cast<double>(s.out_pixels()) * static_cast<double>(s.classes);
  parallel_by_cost(upsample_costs(s, axis), threads_for(work), [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    UpsampleRows<T> rows(s, grid.classes, logits);
    Scratch tile(static_cast<size_t>(2 * grid.classes * lanes) * sizeof(T));
    T *base = tile.as<T>(), *delta = base + grid.classes * lanes;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / s.in_h, row = task % s.in_h, y = axis.first[row];
      if (axis.size_of(row) == 0) continue;
      rows.move_to(image, row);
      for (int64_t x = 0; x < s.out_w; x += lanes) {
        kernels.interpolate(grid.tile(x, lanes), rows.upper(), rows.lower(), base, delta);
        kernels.argmax(UpsampleArgmaxTile<T>{s.classes, axis.size_of(row), std::min(lanes, s.out_w - x), base, delta,
                                             axis.share.data() + y, out + (image * s.out_h + y) * s.out_w + x, s.out_w});
      }
    }
  });
}

}  // namespace

void upsample_argmax(const UpsampleShape& shape, DType dtype, ConstTensor logits, int64_t* out) {
  if (dtype == DType::float64) return run<double>(shape, logits, out);
  run<float>(shape, logits, out);
}

}  // namespace atrous::cpu
