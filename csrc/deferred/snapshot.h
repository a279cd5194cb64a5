// The identities of everything that a call of some modules reads. Tells whether any of it has changed.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace cnnkern {

class Snapshot {
 public:
  // Contains the modules' classes, attributes, and the items of attributes that are dictionaries or lists. The dictionaries in `empty`
  // have to be empty. Pointers are borrowed: the objects are appended to `kept`, which the owner of the snapshot has to keep alive.
  // Python's garbage collector sees them there, but would not see them here.
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
