#!/bin/sh
# Print templates.c: the template files, named by their paths below SRCDIR, as C strings.
# Usage: embed.sh SRCDIR FILE...
set -eu
LC_ALL=C
export LC_ALL

srcdir=$1
shift
printf '/* Made from templates/ by gen/embed.sh; do not edit. */\n'
printf '#include <stddef.h>\n#include "gen/templates.h"\n\n'
printf 'const struct gen_template gen_templates[] = {\n'
for file; do
    printf '    {"%s",\n     ""\n' "$file"
    sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/.*/     "&\\n"/' "$srcdir/$file"
    printf '    },\n'
done
printf '    {NULL, NULL}\n};\n'
