/* templates.h - the text of templates/, embedded by gen/embed.sh in the order of
   TEMPLATES in Makefile.am: lib/base.m4 first, the other macros, then the stages.
   NAME is the path in the source tree ("templates/lib/base.m4"). */
#ifndef GEN_TEMPLATES_H
#define GEN_TEMPLATES_H

struct gen_template {
    const char *name;
    const char *text;
};

extern const struct gen_template gen_templates[];       /* {NULL, NULL} at the end */
#endif
