// Weights in the order in which the dense kernels read them.
#pragma once

#include <algorithm>
#include <vector>

#include "correlate.h"
#include "typed.h"

namespace atrous::cpu {

// A few vectors of written channels, as wide as a tile of the microkernel.
struct Panel {
  int64_t first, columns;  // channels of the group
  int vectors;
  int64_t width;           // vectors * lanes >= columns
  int64_t packed;          // first element of the panel in the packed weights
};

// A stretch of source channels; the sum over one chunk stays in registers.
struct Chunk {
  int64_t first, channels;
  int64_t padded;  // to whole steps of depth
};

// Packed order: [panel][chunk][tap][channel / pair][column][channel % pair], zero where padded.
struct WeightLayout {
  std::vector<Panel> panels;
  std::vector<Chunk> chunks;
  int64_t elements;

  template <class A> static WeightLayout make(int64_t dst_channels, int64_t src_channels, int64_t taps) {
    const MatmulKernels& mm = matmul_kernels<A>();
    WeightLayout layout;
    const int64_t pair = mm.depth_channels;

    // The weights of one panel and chunk should stay in the second-level cache beside the pixels they meet.
    constexpr int64_t panel_bytes = 256 << 10;
    const int64_t widest = mm.vectors * mm.lanes;
    const int64_t most = panel_bytes / (std::max<int64_t>(taps, 1) * widest * static_cast<int64_t>(sizeof(A)));
    const int64_t limit = std::clamp<int64_t>(most / 16 * 16, 32, 256);
    const int64_t count = std::max<int64_t>(ceil_div(src_channels, limit), 1);
    const int64_t step = ceil_div(ceil_div(src_channels, count), 16) * 16;
    for (int64_t first = 0; first == 0 || first < src_channels; first += step) {
      const int64_t channels = std::min(step, src_channels - first);
      layout.chunks.push_back({first, channels, ceil_div(channels, pair) * pair});
      if (step == 0) break;
    }
    int64_t depth = 0;
    for (const Chunk& chunk : layout.chunks) depth += chunk.padded;

    // Panels of nearly equal width.
    int64_t vectors = ceil_div(dst_channels, mm.lanes), first = 0;
    layout.elements = 0;
    for (int64_t left = ceil_div(vectors, mm.vectors); left > 0; --left) {
      const int64_t mine = ceil_div(vectors, left), width = mine * mm.lanes;
      const int64_t columns = std::min(width, dst_channels - first);
      layout.panels.push_back({first, columns, static_cast<int>(mine), width, layout.elements});
      layout.elements += depth * taps * width;
      first += width;
      vectors -= mine;
    }
    return layout;
  }

  int64_t offset(const Panel& panel, const Chunk& chunk, int64_t taps, int64_t tap) const {
    // Chunks before this one are all whole, so their padded channels add up to its first channel.
    return panel.packed + (chunk.first * taps + tap * chunk.padded) * panel.width;
  }
};

// Packs the weights of one group.
template <class S, class A>
void pack_weight(const Correlation& job, const WeightLayout& layout, const S* weight, A* packed, int64_t threads) {
  const int64_t taps = job.taps(), pair = matmul_kernels<A>().depth_channels;
  const int64_t chunks = static_cast<int64_t>(layout.chunks.size());
  constexpr int64_t strip = 16;  // channels at a time through a first-level cache
  // Where channels and taps are one dense row of the weight, as in the contiguous layout, they are transposed together.
  const bool fused = job.weight_tap_w == 1 && job.weight_tap_h == job.w.taps && job.weight_src == taps;
  // The input gradient meets the same layout with the channels exchanged and the taps from last to first.
  const bool reversed = job.weight_tap_w == -1 && job.weight_tap_h == -job.w.taps && job.weight_dst == taps;

  parallel(static_cast<int64_t>(layout.panels.size()) * chunks, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(static_cast<size_t>(strip * taps * layout.panels[0].width) * sizeof(A));
    A* rows = scratch.as<A>();
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = layout.panels[task / chunks];
      const Chunk& chunk = layout.chunks[task % chunks];
      const int64_t width = panel.width;
      std::memset(rows, 0, static_cast<size_t>(strip * taps * width) * sizeof(A));
      for (int64_t k0 = 0; k0 < chunk.channels; k0 += strip) {
        const int64_t depth = std::min(strip, chunk.channels - k0);
        const S* from = weight + panel.first * job.weight_dst + (chunk.first + k0) * job.weight_src;
        // rows[(k * taps + tap)][column]
        if (fused) {
          copy_matrix(panel.columns, depth * taps, from, job.weight_dst, 1, rows, 1, width);
        } else if (reversed) {
          for (int64_t k = 0; k < depth; ++k)
            copy_matrix(panel.columns, taps, from + k * job.weight_src - (taps - 1), taps, 1,
                        rows + (k * taps + taps - 1) * width, 1, -width);
        } else {
          for (int64_t tap = 0; tap < taps; ++tap) {
            const S* at = from + tap / job.w.taps * job.weight_tap_h + tap % job.w.taps * job.weight_tap_w;
            copy_matrix(panel.columns, depth, at, job.weight_dst, job.weight_src, rows + tap * width, 1, taps * width);
          }
        }
        for (int64_t tap = 0; tap < taps; ++tap) {
          A* to = packed + layout.offset(panel, chunk, taps, tap) + k0 * width;
          if (pair == 1) {
            for (int64_t k = 0; k < depth; ++k)
              std::memcpy(to + k * width, rows + (k * taps + tap) * width, static_cast<size_t>(width) * sizeof(A));
            continue;
          }
          for (int64_t k = 0; k < depth; k += 2, to += 2 * width) {
            const A* even = rows + (k * taps + tap) * width;
            const A* odd = even + taps * width;
            const bool both = k + 1 < depth;
            for (int64_t column = 0; column < width; ++column) {
              to[2 * column] = even[column];
              to[2 * column + 1] = both ? odd[column] : A{};
            }
          }
        }
      }
    }
  });
}

}  // namespace atrous::cpu
