// How many threads a session has, and threads of our own, where no pool is at hand.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace owl {

// A session does not say: as many as the processor runs at once, of which a large one has better
// things to do.
inline std::size_t likely_session_threads() {
  static const std::size_t likely = std::clamp(std::thread::hardware_concurrency(), 1U, 16U);
  return likely;
}

// Threads that are waited for at the end, an exception's too: one that is forgotten ends the
// process.
struct Joined {
  std::vector<std::thread> threads;

  Joined() = default;
  ~Joined() {
    for (std::thread& thread : threads) thread.join();
  }
  Joined(const Joined&) = delete;
  Joined& operator=(const Joined&) = delete;
};

// Calls `work` on `count` threads, the calling one among them, or on as many as are to be had: each
// call takes what is left of the work, and returns when nothing is.
template <class Work>
void on_threads(std::size_t count, Work work) {
  Joined others;
  try {
    for (std::size_t i = 1; i < count; ++i) others.threads.emplace_back(work);
  } catch (const std::exception&) {
    return work();  // no more are to be had, or no memory for them: those that there are do it
  }
  work();
}

}  // namespace owl
