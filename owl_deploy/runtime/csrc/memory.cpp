#include "memory.h"

#include <new>
#include <utility>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <span>
#endif

namespace owl {

HugeMemory::HugeMemory(HugeMemory&& other) noexcept { *this = std::move(other); }

HugeMemory& HugeMemory::operator=(HugeMemory&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  return *this;
}

#if defined(__linux__)

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Whether [begin, end) lies in one private mapping of a file.
bool maps_a_file(std::uintptr_t begin, std::uintptr_t end) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return false;
  bool found = false;
  char line[512], rights[5];
  unsigned long from, to, offset, major, minor, inode;
  while (!found && std::fgets(line, sizeof line, maps) != nullptr)
    // NOLINTNEXTLINE(bugprone-unchecked-string-to-number-conversion): the kernel writes numbers
    found = std::sscanf(line, "%lx-%lx %4s %lx %lx:%lx %lu", &from, &to, rights, &offset, &major,
                        &minor, &inode) == 7 &&
            from <= begin && end <= to && inode != 0 && rights[3] == 'p';
  std::fclose(maps);
  return found;
}

// Whether no page of [begin, end), on boundaries of pages, is a copy that was written to.
bool is_unwritten(std::uintptr_t begin, std::uintptr_t end, std::uintptr_t page) {
  constexpr std::uint64_t kPresent = std::uint64_t{1} << 63, kSwapped = std::uint64_t{1} << 62,
                          kOfFile = std::uint64_t{1} << 61;
  const int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pages < 0) return false;
  bool unwritten = true;
  std::uint64_t entries[512];
  for (std::uintptr_t at = begin / page, last = end / page; unwritten && at < last;) {
    const std::size_t count = std::min<std::size_t>(std::size(entries), last - at);
    const auto bytes = static_cast<ssize_t>(count * sizeof *entries);
    unwritten = pread(pages, entries, static_cast<std::size_t>(bytes),
                      static_cast<off_t>(at * sizeof *entries)) == bytes;
    for (const std::uint64_t entry : std::span(entries, unwritten ? count : 0))
      unwritten = unwritten && (entry & kSwapped) == 0 &&
                  ((entry & kPresent) == 0 || (entry & kOfFile) != 0);
    at += count;
  }
  close(pages);
  return unwritten;
}

}  // namespace

bool huge_pages_available() {
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re");
  if (file == nullptr) return false;
  char line[128] = "";
  const bool read = std::fgets(line, sizeof line, file) != nullptr;
  std::fclose(file);
  return read && std::strstr(line, "[never]") == nullptr;
}

HugeMemory::HugeMemory(std::size_t bytes) : mapped_(bytes + kHugePage) {
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  const auto start =
      (reinterpret_cast<std::uintptr_t>(mapping_) + kHugePage - 1) / kHugePage * kHugePage;
  data_ = reinterpret_cast<std::uint8_t*>(start);
  madvise(data_, bytes, MADV_HUGEPAGE);  // advice: without it the memory works all the same
}

HugeMemory::~HugeMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

void release_file_pages(const void* data, std::size_t size) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  // 4 KiB on x86; on Arm up to 64.
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (address + page - 1) / page * page,
                       end = (address + size) / page * page;
  if (begin < end && maps_a_file(begin, end) && is_unwritten(begin, end, page))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

#else

bool huge_pages_available() { return false; }
HugeMemory::HugeMemory(std::size_t) { throw std::bad_alloc(); }
HugeMemory::~HugeMemory() = default;
void release_file_pages(const void*, std::size_t) {}

#endif

}  // namespace owl
