/* file.h - files and folders of the cache, which nobody else may have touched.  DIR is an open folder's
   descriptor, NAME a name in it. */
#ifndef RT_FILE_H
#define RT_FILE_H
#include <stddef.h>
#include <sys/stat.h>

/* 1: it belongs to the user, and nobody else may write to it; else 0. */
int rt_file_is_ours(const struct stat *st);

/* The path of the file that holds this code: libmk.so, or the program.  Returns 0, or -1 when it is not known or
   does not fit into SIZE bytes. */
int rt_file_of_code(char *path, size_t size);

/* All of a regular file of at most 256 MiB, malloc'd and zero-terminated.  OWN: it must be ours, and no link.
   Returns 0, MK_ENOENT (not there, or nothing that we would read), MK_ENOMEM; *data is NULL then. */
int rt_file_read(int dir, const char *name, int own, char **data, size_t *size);

/* Make a file that is not there yet, and bring it to the disk.  Returns 0 or errno. */
int rt_file_write(int dir, const char *name, mode_t mode, const void *data, size_t size);

/* Remove it, whatever it is; links are not followed.  What cannot be removed stays. */
void rt_file_remove(int dir, const char *name);

/* Make the folder PATH and those above it; they may be there.  Returns 0 or errno. */
int rt_file_make_folders(const char *path, mode_t mode);
#endif
