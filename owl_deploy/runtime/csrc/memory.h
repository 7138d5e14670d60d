// Memory in huge pages, for weights: a token reads each once, and with pages of 4 KiB the walks
// through page tables cost a third of the bandwidth (measured in a virtual machine, where a walk is
// two-dimensional).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace owl {

// Whether this system gives huge pages to those who ask; only then is a copy worth its time.
bool huge_pages_available();

class HugeMemory {
 public:
  HugeMemory() = default;
  explicit HugeMemory(std::size_t bytes);  // throws std::bad_alloc
  HugeMemory(HugeMemory&& other) noexcept;
  HugeMemory& operator=(HugeMemory&& other) noexcept;
  ~HugeMemory();
  std::uint8_t* data() const { return data_; }  // on a boundary of 2 MiB

 private:
  void* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  std::uint8_t* data_ = nullptr;
};

// A thread's memory for one purpose: grows, is kept, and is aligned to 64 bytes.
class Scratch {
 public:
  // For a call whose need grows with its input: what a long one took beyond kKept is given back at
  // its end, an exception's too. A prompt of thousands of tokens takes hundreds of megabytes, the
  // tokens after it next to nothing.
  class Borrowed {
   public:
    explicit Borrowed(Scratch& scratch) : scratch_(scratch) {}
    ~Borrowed() {
      if (scratch_.size_ > kKept) scratch_.clear();
    }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;

   private:
    Scratch& scratch_;
  };

  template <class T>
  T* get(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      clear();  // before there is more: of a large one there may be no two
      memory_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::size_t kKept = std::size_t{16} << 20;

  void clear() {
    memory_.reset();
    size_ = 0;
  }

  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::size_t size_ = 0;
};

// Gives back the resident pages of [data, data + size) if they are a view of a file, which keeps
// them for later readers; any other memory, and a page of it that was written to, is left alone.
void release_file_pages(const void* data, std::size_t size);

}  // namespace owl
