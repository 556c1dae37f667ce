/* Process settings that Python's library lacks; all return 0 or an errno. */
#ifndef NATIVE_PROCESS_H
#define NATIVE_PROCESS_H

int native_set_io_flusher(int on);
int native_lock_memory(void);
int native_keep_memory(int bytes);
int native_parent_death_signal(int signal);
#endif
