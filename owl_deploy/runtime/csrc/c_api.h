// What the files of the C interface share. native.py states the same functions for Python.
#pragma once

#include <exception>
#include <string>

#include "kernels.h"

#define OWL_EXPORT extern "C" __attribute__((visibility("default")))

namespace owl_c {

// Keeps the message for owl_last_error(); returns 1, a failed call's status.
int fail(const std::string& message);

// What `body` returns, a status; a failed call's where it throws, which must not leave through C.
template <class Body>
int guarded(Body body) {
  try {
    return body();
  } catch (const std::exception& e) {
    return fail(e.what());
  }
}

// The named kernels, the best for an empty name or null; null, and owl_last_error(), where they
// cannot be had.
const owl::Kernels* kernels_for(const char* isa);

}  // namespace owl_c
