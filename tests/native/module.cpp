// C++-level test module (pybind11): the shared vector header on numpy arrays. Not in the wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "probe_kernels.h"

namespace py = pybind11;

namespace recsparse {

static CpuLevel level_in_test = CpuLevel::kPortable;
CpuLevel cpu_level() { return level_in_test; }

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bits = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<float> widen(const Bits& input) {
  py::array_t<float> output(input.size());
  const auto* source = reinterpret_cast<const T*>(input.data());
  probe_kernels<T>().widen(source, output.mutable_data(), input.size());
  return output;
}

template <class T>
py::array_t<uint16_t> narrow(const Floats& input, bool scalar) {
  py::array_t<uint16_t> output(input.size());
  auto* target = reinterpret_cast<T*>(output.mutable_data());
  const auto& table = probe_kernels<T>();
  (scalar ? table.narrow_scalar : table.narrow)(input.data(), target, input.size());
  return output;
}

py::array_t<float> apply(int function, int64_t activation, const Floats& input) {
  py::array_t<float> output(input.size());
  probe_kernels<float>().apply(Function(function), Activation(activation), input.data(),
                               output.mutable_data(), input.size());
  return output;
}

}  // namespace
}  // namespace recsparse

PYBIND11_MODULE(_native_test, m) {
  using namespace recsparse;
  m.def("set_level", [](int level) { level_in_test = CpuLevel(level); });
  m.def("lanes", [] { return probe_kernels<float>().lanes; });
  m.def("apply", &apply);
  m.def("sum_lanes", [](const Floats& x) { return probe_kernels<float>().sum(x.data()); });
  m.def("max_lanes", [](const Floats& x) { return probe_kernels<float>().max(x.data()); });
  m.def("widen_bf16", &widen<bf16>);
  m.def("widen_f16", &widen<f16>);
  m.def("narrow_bf16", &narrow<bf16>);
  m.def("narrow_f16", &narrow<f16>);
}
