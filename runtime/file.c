/* file.c - see file.h. */
#define _GNU_SOURCE
#include "runtime/file.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gen/err.h"

#define MAX_FILE ((size_t) 1 << 28)     /* what is larger is not ours */

int rt_file_is_ours(const struct stat *st)
{
    return st->st_uid == geteuid() && !(st->st_mode & (S_IWGRP | S_IWOTH));
}

int rt_file_of_code(char *path, size_t size)
{
    ssize_t n = -1;
    Dl_info info;

    if (dladdr((void *) rt_file_of_code, &info) && info.dli_fname && info.dli_fname[0] == '/')
        n = snprintf(path, size, "%s", info.dli_fname);
    if (n < 0 || n >= (ssize_t) size) {
        n = readlink("/proc/self/exe", path, size - 1);
        if (n < 0)
            return -1;
        path[n] = 0;
    }
    return 0;
}

int rt_file_read(int dir, const char *name, int own, char **data, size_t *size)
{
    int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (own ? O_NOFOLLOW : 0));
    struct stat st;
    size_t n = 0;
    ssize_t got = 1;

    *data = NULL;
    *size = 0;
    if (fd < 0)
        return MK_ENOENT;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || (own && !rt_file_is_ours(&st))
        || st.st_size < 0 || (size_t) st.st_size > MAX_FILE) {
        close(fd);
        return MK_ENOENT;
    }
    *data = malloc((size_t) st.st_size + 1);
    if (!*data) {
        close(fd);
        return MK_ENOMEM;
    }
    while (n < (size_t) st.st_size && got > 0) {
        got = read(fd, *data + n, (size_t) st.st_size - n);
        if (got < 0 && errno == EINTR)
            got = 1;
        else if (got > 0)
            n += (size_t) got;
    }
    close(fd);
    (*data)[n] = 0;
    *size = n;
    if (got >= 0)
        return 0;
    free(*data);
    *data = NULL;
    return MK_ENOENT;
}

int rt_file_write(int dir, const char *name, mode_t mode, const void *data, size_t size)
{
    int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    const char *p = data;
    int e = 0;

    if (fd < 0)
        return errno;
    while (size && !e) {
        ssize_t put = write(fd, p, size);
        if (put < 0) {
            e = errno == EINTR ? 0 : errno;
        } else {
            p += put;
            size -= (size_t) put;
        }
    }
    if (!e && (fchmod(fd, mode) || fsync(fd)))
        e = errno;
    if (close(fd) && !e)
        e = errno;
    return e;
}

static void remove_below(int dir, const char *name, int depth)
{
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *e;

    if (!d) {
        if (fd >= 0)
            close(fd);
        unlinkat(dir, name, 0);
        return;
    }
    while ((e = readdir(d)) != NULL)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && depth < 8)
            remove_below(fd, e->d_name, depth + 1);
    closedir(d);
    unlinkat(dir, name, AT_REMOVEDIR);
}

void rt_file_remove(int dir, const char *name)
{
    remove_below(dir, name, 0);
}

int rt_file_make_folders(const char *path, mode_t mode)
{
    char part[4096];
    int e = 0;

    if (strlen(path) >= sizeof part)
        return ENAMETOOLONG;
    if (mkdir(path, mode) == 0 || errno == EEXIST)
        return 0;
    if (errno != ENOENT)
        return errno;
    for (size_t n = 1; path[n]; n++)
        if (path[n] == '/') {
            memcpy(part, path, n);
            part[n] = 0;
            if (mkdir(part, mode) && errno != EEXIST && !e)
                e = errno;
        }
    if (mkdir(path, mode) == 0 || errno == EEXIST)
        return 0;
    return e ? e : errno;
}
