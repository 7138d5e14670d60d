// The table of one instruction set's kernels.
#pragma once

#include "kernel_attention.h"
#include "kernel_elementwise.h"
#include "kernel_linear.h"

namespace owl {
namespace {

template <class V>
consteval Kernels make_kernels(const char* name) noexcept {
  return Kernels{
      .name = name,
      .tile_groups = V::kPanelGroups,
      .panel_groups = V::kPanelGroups,
      .panel_rows = kRowChunk,
      .pass_rows = kPassRows,
      .prefers_dense_int4 = V::kWidens,
      .layout = activation_layout<V>,
      .prepare = prepare_row<V>,
      .matvec = matvec<V>,
      .few = few<V>,
      .refine = refine<V>,
      .largest = largest<V>,
      .panel = panel<V>,
      .finish = finish<V>,
      .rms_norm = rms_norm<V>,
      .attend_one = attend_one<V>,
      .attend_many = attend_many<V>,
      .rotate = rotate<V>,
      .join_chunks = join_chunks<V>,
      .store_cache = store_cache<V>,
  };
}

}  // namespace
}  // namespace owl
