#include "deferred/snapshot.h"

#include <algorithm>

namespace cnnkern {

namespace py = pybind11;

namespace {

// What `module(x)` looks up before it calls forward, and what finds parameters and children.
constexpr const char* kLookedUp[] = {"__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__"};

bool is_holder(PyObject* object) { return PyDict_Check(object) || PyList_Check(object); }

// Calls f(key, value) for the items of a dictionary or a list, in order, until it returns false.
template <typename F>
bool each_item(PyObject* holder, const F& f) {
  if (PyDict_Check(holder)) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    while (PyDict_Next(holder, &at, &key, &value))
      if (!f(key, value)) return false;
  } else {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(holder); ++i)
      if (!f(static_cast<PyObject*>(nullptr), PyList_GET_ITEM(holder, i))) return false;
  }
  return true;
}

void append(const py::list& kept, PyObject* object) {
  if (PyList_Append(kept.ptr(), object) != 0) throw py::error_already_set();
}

py::object attributes_of(PyObject* module) {
  auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw py::error_already_set();
  return attributes;
}

}  // namespace

void Snapshot::put(PyObject* holder, const py::list& kept) {
  each_item(holder, [&](PyObject* key, PyObject* value) {
    if (key != nullptr) append(kept, key);
    append(kept, value);
    items_.push_back({key, value});
    return true;
  });
  holders_.push_back({holder, items_.size()});
}

Snapshot::Snapshot(const py::list& modules, const py::list& empty, const py::list& kept) {
  for (const py::handle dictionary : empty) {
    append(kept, dictionary.ptr());
    empty_.push_back(dictionary.ptr());
  }
  for (const py::handle module : modules) {
    const py::object attributes = attributes_of(module.ptr());
    auto* const type = Py_TYPE(module.ptr());
    const auto keep = [&](PyObject* object) { append(kept, object); };
    keep(module.ptr()), keep(attributes.ptr()), keep(reinterpret_cast<PyObject*>(type));
    modules_.push_back({module.ptr(), attributes.ptr(), type});
    const size_t first = items_.size();
    put(attributes.ptr(), kept);
    for (size_t i = first, last = items_.size(); i < last; ++i)
      if (PyObject* const value = items_[i].value; is_holder(value)) put(value, kept);
    if (std::any_of(lookups_.begin(), lookups_.end(), [&](const Lookup& l) { return l.type == type; })) continue;
    for (const char* text : kLookedUp) {
      const auto name = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
      PyObject* const found = _PyType_Lookup(type, name.ptr());
      keep(name.ptr());
      if (found != nullptr) keep(found);
      lookups_.push_back({type, name.ptr(), found});
    }
  }
}

bool Snapshot::holds() const {
  const auto is_same = [](const Module& m) { return Py_TYPE(m.module) == m.type && attributes_of(m.module).ptr() == m.attributes; };
  if (!std::all_of(empty_.begin(), empty_.end(), [](PyObject* dictionary) { return PyDict_GET_SIZE(dictionary) == 0; })) return false;
  if (!std::all_of(modules_.begin(), modules_.end(), is_same)) return false;
  size_t at = 0;
  for (const auto& [holder, end] : holders_) {
    const bool same = each_item(holder, [&, end = end](PyObject* key, PyObject* value) {
      if (at == end || items_[at].key != key || items_[at].value != value) return false;
      ++at;
      return true;
    });
    if (!same || at != end) return false;
  }
  return std::all_of(lookups_.begin(), lookups_.end(), [](const Lookup& l) { return _PyType_Lookup(l.type, l.name) == l.found; });
}

}  // namespace cnnkern
