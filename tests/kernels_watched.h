// How ThreadSanitizer and AddressSanitizer hear of threads that take turns on stacks of their own (kernels_on_host.h), and
// what fences of a GPU mean to the former. Nothing is left of it where neither watches.
//
// To ThreadSanitizer all threads of a CTA are one, since they take turns: it sees races between CTAs and between ranks,
// not those within a CTA. What is volatile is no race. A fence counts up to the next atomic operation or barrier: what a
// thread has written before is known to who sees that operation, and has a fence behind it.
#include <cstddef>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {

#if defined(__SANITIZE_THREAD__)

// One stack, as the sanitizer knows it.
struct Watched {
  void* fiber = nullptr;
  ~Watched() {
    if (fiber != nullptr) __tsan_destroy_fiber(fiber);
  }
  void begin(char*, size_t) {
    if (fiber == nullptr) fiber = __tsan_create_fiber(0);
  }
};
thread_local void* watched_scheduler;
inline void note_going_to(Watched& next) {
  watched_scheduler = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(next.fiber, 0);
}
inline void note_going_back(bool) { __tsan_switch_to_fiber(watched_scheduler, 0); }
inline void note_coming() {}

thread_local bool is_fenced;
thread_local std::vector<void*> looked_at;
inline void fence() {
  for (void* word : looked_at) __tsan_acquire(word);
  looked_at.clear();
  is_fenced = true;
}
inline void end_fence() { is_fenced = false; }
inline bool is_release(void* word) {
  looked_at.push_back(word);
  return std::exchange(is_fenced, false);
}

#elif defined(__SANITIZE_ADDRESS__)

struct Watched {
  char* bottom = nullptr;
  size_t nbytes = 0;
  void begin(char* stack, size_t size) {
    bottom = stack, nbytes = size;
    __asan_unpoison_memory_region(stack, size);  // its former frames were never left
  }
};
thread_local const void* scheduler_bottom;
thread_local size_t scheduler_nbytes;
thread_local void* kept[2];  // of the scheduler, and of whoever takes its turn
inline void note_going_to(Watched& next) { __sanitizer_start_switch_fiber(&kept[0], next.bottom, next.nbytes); }
inline void note_going_back(bool is_done) {
  __sanitizer_start_switch_fiber(is_done ? nullptr : &kept[1], scheduler_bottom, scheduler_nbytes);
}
inline void note_back() { __sanitizer_finish_switch_fiber(kept[0], nullptr, nullptr); }
inline void note_coming() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_nbytes); }

#else

struct Watched {
  void begin(char*, size_t) {}
};
inline void note_going_to(Watched&) {}
inline void note_going_back(bool) {}
inline void note_coming() {}

#endif

#if !defined(__SANITIZE_ADDRESS__)
inline void note_back() {}
#endif
#if !defined(__SANITIZE_THREAD__)
inline void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void end_fence() {}
inline bool is_release(void*) { return false; }
#endif

}  // namespace host

#if defined(__SANITIZE_THREAD__)
#define WATCH_VOLATILE(size)                                                        \
  extern "C" __attribute__((used)) void __tsan_volatile_read##size(void*) {}        \
  extern "C" __attribute__((used)) void __tsan_volatile_write##size(void*) {}
WATCH_VOLATILE(1)
WATCH_VOLATILE(2)
WATCH_VOLATILE(4)
WATCH_VOLATILE(8)
WATCH_VOLATILE(16)
#undef WATCH_VOLATILE
#endif
