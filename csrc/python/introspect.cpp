// atrous_kernels._introspect: build facts, CPU features and the planner as seen from Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "problem.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream stream(list);
  for (std::string part; std::getline(stream, part, ',');)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = ATROUS_COMPILER;
  facts["build_type"] = ATROUS_BUILD_TYPE;
  facts["torch_headers"] = ATROUS_TORCH_HEADERS;
  facts["sanitize"] = ATROUS_SANITIZE_NAMES;
  facts["isas"] = atrous::cpu::built_isas();
  facts["cuda_archs"] = split(ATROUS_CUDA_ARCH_NAMES);
  return facts;
}

std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> axis_segments(int64_t n_out, int64_t n_src, int64_t taps,
                                                                          int64_t src_step, int64_t src_offset,
                                                                          int64_t tap_step) {
  if (n_out < 0 || n_src < 0 || taps < 0 || src_step < 1)
    throw py::value_error("axis_segments: expected n_out, n_src and taps of at least 0 and src_step of at least 1, but got " +
                          std::to_string(n_out) + ", " + std::to_string(n_src) + ", " + std::to_string(taps) + " and " +
                          std::to_string(src_step));
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> out;
  for (const atrous::Segment& s : atrous::axis_segments({n_out, n_src, taps, src_step, src_offset, tap_step}))
    out.emplace_back(s.start, s.stop, s.tap_start, s.tap_stop);
  return out;
}

auto input_grad_axis(int64_t n_in, int64_t n_out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                     int64_t residue) {
  if (stride < 1 || dilation < 1 || residue < 0 || residue >= stride)
    throw py::value_error("input_grad_axis: expected stride and dilation of at least 1 and 0 <= residue < stride, but got "
                          "stride " + std::to_string(stride) + ", dilation " + std::to_string(dilation) + ", residue " +
                          std::to_string(residue));
  const atrous::InputGradAxis g = atrous::input_grad_axis(n_in, n_out, kernel, stride, padding, dilation, residue);
  const atrous::Axis& a = g.axis;
  return std::make_tuple(a.n_out, a.n_src, a.taps, a.src_step, a.src_offset, a.tap_step, g.first_tap, g.tap_stride);
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "Build facts, CPU features and the planner of the compiled library.";
  m.def("build_facts", &build_facts, "Compiler, build type, instruction sets (isas) and CUDA architectures that were built.");
  m.def("cpu_features", &atrous::cpu::cpu_features, "Features of this machine that matter to the CPU kernels.");
  m.def("selected_isa", &atrous::cpu::selected_isa,
        "The instruction set that runs here. Raises RuntimeError where ATROUS_CPU_ISA asks for one that cannot.");
  m.def("axis_segments", &axis_segments, py::arg("n_out"), py::arg("n_src"), py::arg("taps"), py::arg("src_step"),
        py::arg("src_offset"), py::arg("tap_step"), "[(start, stop, tap_start, tap_stop)]: see csrc/include/problem.h.");
  m.def("input_grad_axis", &input_grad_axis, py::arg("n_in"), py::arg("n_out"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("residue"),
        "(n_out, n_src, taps, src_step, src_offset, tap_step, first_tap, tap_stride): see csrc/include/problem.h.");
}
