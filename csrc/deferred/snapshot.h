// What modules hold and what calling them looks up, by identity: tells whether anything has changed that a call would read.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace cnnkern {

class Snapshot {
 public:
  // Of the modules' classes, attributes, and what is in attributes that are dictionaries or lists. The dictionaries `empty` are to be
  // so. Pointers are borrowed: what they point to is appended to `kept`, for whoever makes a snapshot to keep it as long. Python's
  // collector sees objects there, and would not see them here.
  Snapshot(const pybind11::list& modules, const pybind11::list& empty, const pybind11::list& kept);
  bool holds() const;

 private:
  struct Module {
    PyObject *module, *attributes;
    PyTypeObject* type;
  };
  struct Item {
    PyObject *key, *value;  // key is null in a list
  };
  struct Holder {  // a dictionary or a list
    PyObject* holder;
    size_t end;  // of its items, which begin where those of the one before end
  };
  struct Lookup {
    PyTypeObject* type;
    PyObject *name, *found;
  };
  void put(PyObject* holder, const pybind11::list& kept);

  std::vector<Module> modules_;
  std::vector<PyObject*> empty_;
  std::vector<Holder> holders_;
  std::vector<Item> items_;
  std::vector<Lookup> lookups_;
};

}  // namespace cnnkern
