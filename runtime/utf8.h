/* utf8.h - UTF-8 text: checking, walking, NFC. */
#ifndef RT_UTF8_H
#define RT_UTF8_H
#include <stddef.h>
#include <stdint.h>

/* Bytes at the start of TEXT that are whole, valid UTF-8 characters; LEN if all are. */
size_t rt_utf8_valid(const char *text, size_t len);

/* The character at S, which is the start of one in valid UTF-8; returns its length. */
int rt_utf8_get(const char *s, uint32_t *c);

/* The character that ends just before S; same conditions. */
int rt_utf8_get_before(const char *s, uint32_t *c);

/* Write C, a valid code point, to OUT (4 bytes); returns its length. */
int rt_utf8_put(uint32_t c, char *out);

/* Unicode White_Space; and what the regex crate calls a word character. */
int rt_utf8_is_space(uint32_t c);
int rt_utf8_is_word(uint32_t c);

/* Normal form C of TEXT (valid UTF-8) as Unicode 9 has it, see nfc.c.  *OUT is TEXT itself when
   nothing can change, else a new string that the caller frees.  Time is linear whatever the text.
   Returns 0 or MK_ENOMEM. */
int rt_utf8_nfc(const char *text, size_t len, char **out, size_t *out_len);
#endif
