// cnnkern._C: what is not an operator. Importing it registers the operators.
#include <ATen/Version.h>
#include <torch/version.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>

#include "autograd/dense_block.h"
#include "autograd/recompute.h"
#include "block_pool.h"
#include "deferred/batch_norm.h"
#include "deferred/deferred.h"
#include "deferred/capture.h"
#include "deferred/concatenation.h"
#include "deferred/folded_conv.h"
#include "deferred/folded_linear.h"
#include "deferred/memory.h"
#include "deferred/snapshot.h"
#include "kernels.h"
#include "own_convolutions.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", "g++ " __VERSION__},
      {"torch", TORCH_VERSION},
#ifdef CNNKERN_CUDA
      {"cuda", CNNKERN_CUDA},
      {"cuda_architectures", CNNKERN_CUDA_ARCHITECTURES},
#else
      {"cuda", ""},
      {"cuda_architectures", ""},
#endif
      {"cpu_capabilities", CNNKERN_CPU},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of cnnkern; importing this module registers torch.ops.cnnkern.*";
  m.def("build_info", &build_info, "What this extension was built with, as a dict of strings.");
  m.def("cpu_capability", &at::get_cpu_capability,
        "The instruction set whose kernels are used: DEFAULT, AVX2 or AVX512. ATEN_CPU_CAPABILITY selects it.");
  pybind11::class_<cnnkern::Site, std::shared_ptr<cnnkern::Site>>(m, "Site", "How the results of one batch norm module were computed.")
      .def(pybind11::init<>())
      .def(pybind11::pickle([](const cnnkern::Site&) { return pybind11::tuple(); },  // a copied module has run nothing yet
                            [](const pybind11::tuple&) { return std::make_shared<cnnkern::Site>(); }))
      .def("compute_activations", &cnnkern::Site::compute_activations, "Defers no activations any more.")
      .def("convolutions", &cnnkern::Site::convolutions, "How many activations a convolution computed as it read them.")
      .def("fusions", &cnnkern::Site::fusions, "How many were fused with which operation.")
      .def("alone", &cnnkern::Site::alone, "How many were computed without fusion, by reason.")
      .def("batch_norm", &cnnkern::defer_batch_norm, pybind11::call_guard<pybind11::gil_scoped_release>(),
           "A batch norm whose result is deferred if possible, so that the next activation or addition is fused with it.");
  pybind11::class_<cnnkern::FoldedConv::Settings>(m, "ConvSettings", "The settings of a folded convolution.")
      .def(pybind11::init<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int64_t, std::vector<int64_t>, std::string,
                          std::string, int64_t, int64_t, bool>());
  using cnnkern::Folded;
  pybind11::class_<Folded, std::shared_ptr<Folded>>(m, "Folded", pybind11::dynamic_attr(), "A layer of a folded model.")
      .def("holds", &Folded::holds, "Whether the sources are these and unchanged.")
      .def("call", &Folded::call, pybind11::call_guard<pybind11::gil_scoped_release>(),
           "The deferred result for an input; None if PyTorch's layer has to compute it.")
      .def("run", [](Folded& layer, const at::Tensor& x, const std::string& act) { return layer.run(cnnkern::FoldedInput(x, false), {}, {act}, x.scalar_type()); },
           pybind11::call_guard<pybind11::gil_scoped_release>(), "The layer fused with an activation.")
      .def("take_over", &Folded::take_over, pybind11::call_guard<pybind11::gil_scoped_release>(),
           "The same, in place of another layer, whose deferred result is given.");
  pybind11::class_<cnnkern::FoldedConv, Folded, std::shared_ptr<cnnkern::FoldedConv>>(m, "FoldedConv", "A convolution of a folded model.")
      .def(pybind11::init<const at::Tensor&, const std::optional<at::Tensor>&, cnnkern::FoldedConv::Settings,
                          const std::vector<at::ScalarType>&, Folded::Pack, const std::vector<at::Tensor>&>());
  using Block = cnnkern::FoldedConv::Block;
  pybind11::class_<Block>(m, "MobileBlock", "Folded 1x1, depthwise and 1x1 convolutions in one kernel; the first or the last may be None.")
      .def(pybind11::init([](cnnkern::FoldedConv* expand, cnnkern::FoldedConv* depthwise, cnnkern::FoldedConv* project, const std::string& act) {
             return Block{expand, depthwise, project, {act}, {act}};
           }),
           pybind11::keep_alive<1, 2>(), pybind11::keep_alive<1, 3>(), pybind11::keep_alive<1, 4>())
      .def("run", [](const Block& block, const at::Tensor& x, const std::optional<at::Tensor>& residual, const std::string& act) {
             return block.run(x, cnnkern::tensor_or_undefined(residual), {act});
           }, pybind11::call_guard<pybind11::gil_scoped_release>(), "act(block(x) + residual).")
      .def("is_faster", &Block::is_faster, "Whether cnnkern.fold uses it for x.");
  pybind11::class_<cnnkern::FoldedLinear, Folded, std::shared_ptr<cnnkern::FoldedLinear>>(m, "FoldedLinear",
                                                                                          "A linear layer of a folded model.")
      .def(pybind11::init<const at::Tensor&, const std::optional<at::Tensor>&, int64_t, const std::vector<at::ScalarType>&, Folded::Pack,
                          const std::vector<at::Tensor>&>());
  pybind11::class_<cnnkern::Snapshot>(m, "Snapshot", "The identities of everything that a call of some modules reads.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&, const pybind11::list&>(), pybind11::arg("modules"),
           pybind11::arg("empty"), pybind11::arg("kept"),
           "Of modules, and of dictionaries that have to be empty. Appends objects to the list `kept`; keep that as long.")
      .def("holds", &cnnkern::Snapshot::holds, "Whether nothing has changed.");
  pybind11::class_<cnnkern::FeatureBuffer, std::shared_ptr<cnnkern::FeatureBuffer>>(m, "FeatureBuffer", "The channels of a dense block.")
      .def("features", &cnnkern::FeatureBuffer::features, "All channels so far, as a tensor.")
      .def("append", &cnnkern::FeatureBuffer::append, pybind11::call_guard<pybind11::gil_scoped_release>(),
           "Whether a tensor's channels are behind them now; if not, PyTorch has to concatenate.");
  m.def("feature_buffer", &cnnkern::FeatureBuffer::of, pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::arg("x"),
        pybind11::arg("further"), "A FeatureBuffer with the channels of x; None where PyTorch has to concatenate.");
  m.def("pool_sizes", [] { const auto s = cnnkern::block_pool::sizes(); return std::tuple(s.used, s.kept, s.most); },
        "Bytes of blocks in use, of unused blocks, and the most that results have needed at one time.");
  m.def("empty_pool", &cnnkern::block_pool::give_back, "Returns unused blocks to the system.");
  m.def("set_pool", &cnnkern::block_pool::set_on, "Switches the pool of CPU results on or off.");
  m.def("set_own_convolutions", &cnnkern::set_own_convolutions,
        "Makes cnnkern's kernels compute these convolutions, against the built-in rule; replaces the earlier set.");
  m.def("sees_captures", &cnnkern::sees_captures, "Whether batch norms can be deferred while a CUDA graph is captured.");
  m.def("learn_parts", &cnnkern::learn_parts, pybind11::arg("whole"), pybind11::arg("part"),
        "What memory that is a part of other memory looks like, from a tensor on each.");
  m.def("materialise_waiting", &cnnkern::materialise_waiting, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Computes what is deferred in this thread and still held.");
  m.def("folded_of", &cnnkern::folded_of, "The Folded whose deferred result a tensor is; else None.");
  pybind11::class_<cnnkern::Packed, std::shared_ptr<cnnkern::Packed>>(m, "Packed", "What autograd saves in place of a tensor.");
  m.def("pack", [](const at::Tensor& t) { return std::make_shared<cnnkern::Packed>(t, cnnkern::Depth::kAny); }, pybind11::arg("tensor"),
        "cnnkern.recompute's saved-tensor hook.");
  m.def("unpack", &cnnkern::Packed::unpack, pybind11::call_guard<pybind11::gil_scoped_release>(), "The tensor that was packed.");
  cnnkern::hooks_are_ours_with(m.attr("pack").ptr());
  m.def("watch", &cnnkern::watch_concatenations, pybind11::arg("on"),
        "Switches recording of this thread's concatenations on or off.");
  m.def("may_recompute", &cnnkern::may_recompute, "Whether no other saved-tensor hooks are active in this thread.");
#ifdef CNNKERN_CUDA
  m.def("let_launchers_answer", &cnnkern::let_launchers_answer,
        "Whether torch.ops.cnnkern_launchers answer for CUDA tensors, in the place of this extension's kernels.");
#endif
}
