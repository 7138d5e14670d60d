// Threads of our own, where no pool is at hand.
#pragma once

#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace owl {

// Calls `work` on `count` threads, the calling one among them, or on as many as are to be had: each
// call takes what is left of the work, and returns when nothing is.
template <class Work>
void on_threads(std::size_t count, Work work) {
  std::vector<std::thread> others;
  try {
    for (std::size_t i = 1; i < count; ++i) others.emplace_back(work);
    work();
  } catch (const std::system_error&) {
    work();  // no more are to be had: those that there are do it
  }
  for (std::thread& other : others) other.join();
}

}  // namespace owl
