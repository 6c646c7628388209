// How the libraries of these tests report a failed launch through C: as text, which lives until the next failure.
#pragma once

#include <exception>
#include <string>

namespace {

std::string last_error;

template <typename Run>
const char* guarded(Run run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

}  // namespace
