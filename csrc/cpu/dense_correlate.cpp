// Dense correlation: a matrix product of pixels by written channels whose depth is (valid taps) x (source channels).
//
// The output is cut into rectangles of constant valid taps (problem.h). A rectangle is flattened over images, rows and
// columns into blocks of pixels; an item of work is one block times one panel of channels. A kernel reads pixels through
// one address per row of its tile, plus an offset per tap that the whole rectangle shares.
//
// The kernels want the channels of a pixel side by side. An NHWC source is read in place. Any other source (and bfloat16
// where the machine has no instruction for it) is staged: a chunk of channels at a time is brought into that form in a
// cache-sized buffer, shared by all threads.
#include <array>

#include "correlate.h"
#include "pack_weight.h"
#include "statistics.h"
#include "typed.h"

namespace atrous::cpu {
namespace {

// Pixels per block: whole tiles for every height of tile (6, 9 and 12 rows with 32 registers; 6 and 12 with 16).
constexpr int64_t block_pixels = 180;
constexpr int64_t small_block_pixels = 36;
constexpr int64_t stage_bytes = 4 << 20;
constexpr int64_t cache_alias = 2048;  // bytes
constexpr int64_t cached_weights = 256 << 10;  // bytes

// Images [image, image_end) and written rows [row, row_end), and the source rows that these read.
struct Slab {
  int64_t image, image_end, row, row_end;
  int64_t src_row, src_row_end;
};

// Pixels [first, first + pixels) of a rectangle flattened over (image, row, column), times one panel.
struct Item {
  Segment h, w;
  int64_t first, pixels;
  int64_t panel;
  int64_t sums;  // where its sums lie in the buffer of the slab
  int64_t part;  // of the statistics: its first one
};

void source_rows(const Axis& h, Slab& slab) {
  const int64_t reach = (h.taps - 1) * h.tap_step;
  const int64_t first = slab.row * h.src_step + h.src_offset + std::min<int64_t>(reach, 0);
  const int64_t last = (slab.row_end - 1) * h.src_step + h.src_offset + std::max<int64_t>(reach, 0);
  slab.src_row = std::clamp<int64_t>(first, 0, h.n_src);
  slab.src_row_end = std::clamp<int64_t>(last + 1, slab.src_row, h.n_src);
}

std::vector<Slab> make_slabs(const Correlation& job, bool staged, int64_t pixel_bytes) {
  const int64_t rows = job.h.n_out;
  const int64_t row_bytes = std::max<int64_t>(job.w.n_src * pixel_bytes, 1);
  int64_t images = job.batch, strip = rows;
  if (staged) {
    images = std::clamp<int64_t>(stage_bytes / (row_bytes * job.h.n_src), 1, job.batch);
    if (row_bytes * job.h.n_src > stage_bytes) {
      const int64_t halo = (job.h.taps - 1) * std::abs(job.h.tap_step);
      const int64_t src_rows = std::max<int64_t>(stage_bytes / row_bytes, 2 * halo + 4);
      strip = std::clamp<int64_t>((src_rows - halo) / job.h.src_step, 1, rows);
    }
  }
  std::vector<Slab> slabs;
  for (int64_t image = 0; image < job.batch; image += images)
    for (int64_t row = 0; row < rows; row += strip) {
      Slab slab{image, std::min(image + images, job.batch), row, std::min(row + strip, rows), 0, 0};
      source_rows(job.h, slab);
      slabs.push_back(slab);
    }
  return slabs;
}

template <class S, class A> class DenseCorrelation {
 public:
  using Acc = Accumulator<A>;

  DenseCorrelation(const Correlation& job)
      : job_(job),
        mm_(matmul_kernels<A>()),
        layout_(WeightLayout::make<A>(job.dst_channels, job.src_channels, job.taps())),
        statistics_(job.groups * job.dst_channels) {
    const bool nhwc = job.src.strides.c == 1 || job.src_channels == 1;
    // Pixels whole pages apart would compete for a few cache sets; with several taps, copying them together pays.
    const bool crowded = job.taps() > 1 && job.src.strides.w * static_cast<int64_t>(sizeof(S)) % cache_alias == 0;
    staged_ = !std::is_same_v<S, A> || !nhwc || job.src_channels % mm_.depth_channels != 0 || crowded;
    direct_ = std::is_same_v<S, Acc> && (job.dst.strides.c == 1 || job.dst_channels == 1);
    // Where the columns of the kernel read neighbouring pixels of few channels, they are one longer row of channels.
    const int64_t pixel = staged_ ? layout_.chunks[0].padded : job.src.strides.w;
    fused_ = layout_.chunks.size() == 1 && layout_.chunks[0].padded == job.src_channels && pixel == job.src_channels &&
             job.w.tap_step == 1;
    threads_ = threads_for(job.flops());
  }

  void run() {
    const int64_t taps = job_.taps();
    int64_t padded = 0;
    for (const Panel& panel : layout_.panels) padded += panel.width;
    Scratch packed(job_.packed == nullptr ? static_cast<size_t>(layout_.elements) * sizeof(A) : 0);
    Scratch bias(static_cast<size_t>(3 * padded) * sizeof(Acc));
    const int64_t chunk_channels = layout_.chunks.front().padded;
    const std::vector<Slab> slabs = make_slabs(job_, staged_, chunk_channels * static_cast<int64_t>(sizeof(A)));
    int64_t stage_elements = 0;
    for (const Slab& slab : slabs)
      stage_elements = std::max(stage_elements, (slab.image_end - slab.image) * (slab.src_row_end - slab.src_row) *
                                                    job_.w.n_src * chunk_channels);
    Scratch stage(staged_ ? static_cast<size_t>(stage_elements) * sizeof(A) : 0);
    packed_ = packed.as<A>();
    bias_ = bias.as<Acc>();
    scale_ = bias_ + padded;
    shift_ = scale_ + padded;
    stage_ = stage.as<A>();

    for (int64_t group = 0; group < job_.groups; ++group) {
      group_ = group;
      const S* weight = static_cast<const S*>(job_.weight) + group * job_.weight_group;
      if (job_.packed != nullptr) packed_ = static_cast<const A*>(job_.packed) + group * layout_.elements;
      else if (taps > 0) pack_weight<S, A>(job_, layout_, weight, packed.as<A>(), threads_);
      std::fill_n(bias_, padded, Acc{0});
      if (job_.bias != nullptr)
        for (int64_t i = 0; i < job_.dst_channels; ++i)
          bias_[i] = convert_value<S, Acc>(static_cast<const S*>(job_.bias)[group * job_.dst_channels + i]);
      if (job_.finish.scale != nullptr) {
        std::fill_n(scale_, 2 * padded, Acc{0});
        std::copy_n(static_cast<const Acc*>(job_.finish.scale) + group * job_.dst_channels, job_.dst_channels, scale_);
        std::copy_n(static_cast<const Acc*>(job_.finish.shift) + group * job_.dst_channels, job_.dst_channels, shift_);
      }
      parts_ = 0;
      for (const Slab& slab : slabs) run_slab(slab);
    }
    if (job_.statistics.mean != nullptr)
      statistics_.merge(static_cast<Acc*>(job_.statistics.mean), static_cast<Acc*>(job_.statistics.moment));
  }

 private:
  void run_slab(const Slab& slab) {
    const std::vector<Item> items = make_items(slab);
    if (items.empty()) return;
    statistics_.room();
    const int64_t chunks = static_cast<int64_t>(layout_.chunks.size());
    if (!staged_) {
      const Strides& s = job_.src.strides;
      src_ = reinterpret_cast<const char*>(static_cast<const S*>(job_.src.data) + group_ * job_.src_channels * s.c);
      src_strides_ = s;
      src_image_ = src_row_ = 0;
      return run_items(items, nullptr, 0, chunks);
    }
    // Between chunks the sums of the slab wait in the destination itself, or in a buffer where its form differs.
    const bool keep = !direct_ && chunks > 1;
    Scratch sums(keep ? static_cast<size_t>(sums_elements_) * sizeof(Acc) : 0);
    src_ = reinterpret_cast<const char*>(stage_);
    src_image_ = slab.image;
    src_row_ = slab.src_row;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      stage_chunk(slab, layout_.chunks[chunk]);
      run_items(items, keep ? sums.as<Acc>() : nullptr, chunk, chunk + 1);
    }
  }

  // Source rows of the slab and the channels of the chunk, NHWC, in the type that is multiplied.
  void stage_chunk(const Slab& slab, const Chunk& chunk) {
    const Strides& s = job_.src.strides;
    const int64_t width = job_.w.n_src, depth = chunk.padded;
    const int64_t rows = slab.src_row_end - slab.src_row, images = slab.image_end - slab.image;
    src_strides_ = {rows * width * depth, 1, width * depth, depth};
    // Rows that follow each other without a gap are one long row.
    const bool flat = s.h == s.w * width;
    const int64_t line = flat ? rows * width : width, lines = flat ? 1 : rows;
    constexpr int64_t piece = 128;
    const int64_t pieces = ceil_div(line, piece);
    const S* src = static_cast<const S*>(job_.src.data) + (group_ * job_.src_channels + chunk.first) * s.c;
    parallel(images * lines * pieces, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / (lines * pieces), row = task / pieces % lines, first = task % pieces * piece;
        const int64_t pixels = std::min(piece, line - first);
        const S* from = src + (slab.image + image) * s.n + (slab.src_row + row) * s.h + first * s.w;
        A* to = stage_ + ((image * lines + row) * line + first) * depth;
        copy_matrix(pixels, chunk.channels, from, s.w, s.c, to, depth, 1);
        if (depth > chunk.channels)
          for (int64_t pixel = 0; pixel < pixels; ++pixel) to[pixel * depth + depth - 1] = A{};
      }
    });
  }

  std::vector<Item> make_items(const Slab& slab) {
    const int64_t images = slab.image_end - slab.image;
    std::vector<std::pair<Segment, Segment>> rectangles;
    int64_t pixels = 0;
    for (Segment h : axis_segments(job_.h)) {
      h.start = std::max(h.start, slab.row);
      h.stop = std::min(h.stop, slab.row_end);
      if (h.start >= h.stop) continue;
      for (const Segment& w : axis_segments(job_.w)) {
        rectangles.emplace_back(h, w);
        pixels += images * (h.stop - h.start) * (w.stop - w.start);
      }
    }
    const int64_t panels = static_cast<int64_t>(layout_.panels.size());
    // Few weights stay in a second-level cache while all panels of a small block are written, whole lines of pixels at a time.
    const bool few_weights = panels > 1 && layout_.elements * static_cast<int64_t>(sizeof(A)) <= cached_weights;
    const bool tall = !few_weights && pixels * panels >= 8 * threads_ * block_pixels;
    const int64_t block = tall ? block_pixels : small_block_pixels;
    std::vector<Item> items;
    sums_elements_ = 0;
    for (const auto& [h, w] : rectangles) {
      const int64_t size = images * (h.stop - h.start) * (w.stop - w.start);
      for (int64_t first = 0; first < size; first += block) {
        const int64_t mine = std::min(block, size - first);
        for (int64_t panel = 0; panel < panels; ++panel) {
          items.push_back({h, w, first, mine, panel, sums_elements_, parts_});
          sums_elements_ += mine * layout_.panels[panel].width;
        }
        count_parts(mine);
      }
    }
    slab_ = slab;
    return items;
  }

  // The statistics have parts of one size, whatever the height of a block, which depends on the threads.
  void count_parts(int64_t pixels) {
    if (job_.statistics.mean == nullptr) return;
    for (int64_t first = 0; first < pixels; first += small_block_pixels, ++parts_)
      if (group_ == 0) statistics_.add(std::min(small_block_pixels, pixels - first));
  }

  void run_items(const std::vector<Item>& items, Acc* sums, int64_t chunk, int64_t chunk_end) {
    std::vector<int64_t> cost;
    cost.reserve(items.size());
    for (const Item& item : items) {
      const int64_t taps = (item.h.tap_stop - item.h.tap_start) * (item.w.tap_stop - item.w.tap_start);
      cost.push_back(item.pixels * layout_.panels[item.panel].vectors * std::max<int64_t>(taps, 1));
    }
    parallel_by_cost(cost, threads_, [&](int64_t begin, int64_t end) {
      run_range(items.data() + begin, items.data() + end, sums, chunk, chunk_end);
    });
  }

  void run_range(const Item* item, const Item* end, Acc* sums, int64_t chunk, int64_t chunk_end) {
    int64_t widest = 0;
    for (const Panel& panel : layout_.panels) widest = std::max(widest, panel.width);
    Scratch local(direct_ ? 0 : static_cast<size_t>(block_pixels * widest) * sizeof(Acc));
    std::array<int64_t, block_pixels> from, to;
    std::vector<int64_t> a_offset;
    std::vector<const void*> b;
    const Item* placed = nullptr;
    for (; item < end; ++item) {
      if (placed == nullptr || placed->first != item->first || placed->h.start != item->h.start ||
          placed->w.start != item->w.start) {
        place(*item, from.data(), to.data(), a_offset);
        placed = item;
      }
      Acc* block = sums != nullptr ? sums + item->sums : local.as<Acc>();
      for (int64_t c = chunk; c < chunk_end; ++c)
        multiply(*item, layout_.chunks[c], from.data(), to.data(), a_offset, b, block);
      if (chunk_end < static_cast<int64_t>(layout_.chunks.size())) continue;
      if (!direct_) emit(*item, to.data(), block);
      if (job_.statistics.mean != nullptr) take_statistics(*item, to.data(), block);
    }
  }

  // Addresses of a block: of its pixels under the first valid tap (bytes) and in the destination (elements), and of the
  // other taps relative to the first.
  void place(const Item& item, int64_t* from, int64_t* to, std::vector<int64_t>& a_offset) const {
    const Axis &ah = job_.h, &aw = job_.w;
    const Strides &s = src_strides_, &d = job_.dst.strides;
    const int64_t size = sizeof(A);
    const int64_t rows = item.h.stop - item.h.start, columns = item.w.stop - item.w.start;
    int64_t x = item.first % columns, y = item.first / columns % rows, n = slab_.image + item.first / columns / rows;
    const int64_t y0 = item.h.start * ah.src_step + ah.src_offset + item.h.tap_start * ah.tap_step - src_row_;
    const int64_t x0 = item.w.start * aw.src_step + aw.src_offset + item.w.tap_start * aw.tap_step;
    for (int64_t i = 0; i < item.pixels; ++i) {
      from[i] = size * ((n - src_image_) * s.n + (y0 + y * ah.src_step) * s.h + (x0 + x * aw.src_step) * s.w);
      to[i] = n * d.n + (item.h.start + y) * d.h + (item.w.start + x) * d.w;
      if (++x == columns) {
        x = 0;
        if (++y == rows) y = 0, ++n;
      }
    }
    a_offset.clear();
    for (int64_t i = 0; i < item.h.tap_stop - item.h.tap_start; ++i)
      for (int64_t j = 0; j < (fused_ ? 1 : item.w.tap_stop - item.w.tap_start); ++j)
        a_offset.push_back(size * (i * ah.tap_step * s.h + j * aw.tap_step * s.w));
  }

  void multiply(const Item& item, const Chunk& chunk, const int64_t* from, const int64_t* to,
                const std::vector<int64_t>& a_offset, std::vector<const void*>& b, Acc* block) const {
    const Panel& panel = layout_.panels[item.panel];
    b.clear();
    const int64_t columns = item.w.tap_stop - item.w.tap_start;
    for (int64_t i = item.h.tap_start; i < item.h.tap_stop; ++i)
      for (int64_t j = item.w.tap_start; j < item.w.tap_start + (fused_ ? std::min<int64_t>(columns, 1) : columns); ++j)
        b.push_back(packed_ + layout_.offset(panel, chunk, job_.taps(), i * job_.w.taps + j));
    const char* src = staged_ ? src_ : src_ + chunk.first * static_cast<int64_t>(sizeof(A));
    Acc* dst = direct_ ? static_cast<Acc*>(job_.dst.data) + (group_ * job_.dst_channels + panel.first) * job_.dst.strides.c
                       : nullptr;

    const char* a[max_rows];
    void* c[max_rows];
    MatmulTile tile{static_cast<int64_t>(b.size()),
                    chunk.padded / mm_.depth_channels * (fused_ ? columns : 1),
                    a_offset.data(),
                    b.data(),
                    a,
                    c,
                    chunk.first == 0 ? bias_ + panel.first : nullptr,
                    direct_ ? panel.columns : panel.width,
                    {}};
    if (job_.finish.scale != nullptr && chunk.first + chunk.channels == job_.src_channels)
      tile.finish = {scale_ + panel.first, shift_ + panel.first, job_.finish.low, job_.finish.high, job_.finish.residual};
    const int64_t tall = mm_.rows_of[panel.vectors];
    for (int64_t first = 0; first < item.pixels; first += tall) {
      const int64_t rows = std::min(tall, item.pixels - first);
      for (int64_t i = 0; i < rows; ++i) {
        a[i] = src + from[first + i];
        c[i] = direct_ ? dst + to[first + i] : block + (first + i) * panel.width;
      }
      mm_.kernel[panel.vectors][rows](tile);
    }
  }

  // Finished sums into the destination's type and layout, in runs of pixels that are equally spaced there.
  void emit(const Item& item, const int64_t* to, const Acc* block) const {
    const Panel& panel = layout_.panels[item.panel];
    const Strides& d = job_.dst.strides;
    S* dst = static_cast<S*>(job_.dst.data) + (group_ * job_.dst_channels + panel.first) * d.c;
    for (int64_t i = 0; i < item.pixels;) {
      int64_t end = i + 1;
      while (end < item.pixels && to[end] - to[end - 1] == d.w) ++end;
      copy_matrix(end - i, panel.columns, block + i * panel.width, panel.width, 1, dst + to[i], d.w, d.c);
      i = end;
    }
  }

  void take_statistics(const Item& item, const int64_t* to, const Acc* block) {
    const Panel& panel = layout_.panels[item.panel];
    const int64_t channel = group_ * job_.dst_channels + panel.first;
    const Acc* written = direct_ ? static_cast<const Acc*>(job_.dst.data) + channel * job_.dst.strides.c : block;
    std::array<int64_t, small_block_pixels> at;
    int64_t part = item.part;
    for (int64_t first = 0; first < item.pixels; first += small_block_pixels, ++part) {
      for (int64_t i = 0; i < std::min(small_block_pixels, item.pixels - first); ++i)
        at[i] = direct_ ? to[first + i] : (first + i) * panel.width;
      statistics_.take(part, channel, panel.columns, written, at.data());
    }
  }

  const Correlation& job_;
  const MatmulKernels& mm_;
  const WeightLayout layout_;
  PartialStatistics<Acc> statistics_;
  int64_t parts_ = 0;
  bool staged_, direct_, fused_;
  int64_t threads_, group_ = 0, sums_elements_ = 0;
  const A* packed_ = nullptr;
  A* stage_ = nullptr;
  Acc *bias_ = nullptr, *scale_ = nullptr, *shift_ = nullptr;  // padded to whole panels
  Slab slab_{};
  const char* src_ = nullptr;  // the source, or its staged chunk, whose first image and row are src_image_ and src_row_
  Strides src_strides_{};
  int64_t src_image_ = 0, src_row_ = 0;
};

// call.operator()<S, A>() for the type that is stored and the type that is multiplied.
template <class Call> auto with_types(DType dtype, const Call& call) {
  if (dtype == DType::float32) return call.template operator()<float, float>();
  if (dtype == DType::float64) return call.template operator()<double, double>();
  if (kernels().matmul_bf16.lanes > 0) return call.template operator()<bf16, bf16>();
  return call.template operator()<bf16, float>();
}

}  // namespace

void dense_correlate(const Correlation& job, DType dtype) {
  with_types(dtype, [&]<class S, class A>() { DenseCorrelation<S, A>(job).run(); });
}

int64_t packed_weight_bytes(const Correlation& job, DType dtype) {
  return with_types(dtype, [&]<class S, class A>() {
    const int64_t elements = WeightLayout::make<A>(job.dst_channels, job.src_channels, job.taps()).elements;
    return job.groups * elements * static_cast<int64_t>(sizeof(A));
  });
}

void pack_dense_weight(const Correlation& job, DType dtype, void* packed) {
  with_types(dtype, [&]<class S, class A>() {
    const WeightLayout layout = WeightLayout::make<A>(job.dst_channels, job.src_channels, job.taps());
    const int64_t threads = threads_for(static_cast<double>(job.groups * layout.elements));
    for (int64_t group = 0; group < job.groups; ++group)
      pack_weight<S, A>(job, layout, static_cast<const S*>(job.weight) + group * job.weight_group,
                        static_cast<A*>(packed) + group * layout.elements, threads);
  });
}

}  // namespace atrous::cpu
