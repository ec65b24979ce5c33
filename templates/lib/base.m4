m4_divert(-1)
m4_changequote({|, |})
m4_changecom(//)
m4_undefine({|m4_esyscmd|}, {|m4_syscmd|}, {|m4_include|}, {|m4_sinclude|})

Macros of the templates.  Quotes are {| and |}; text after // is never expanded.
Read with m4 -P -E, so that only m4_ builtins, our t_ macros and the MODEL_, GPU_ and
PLAN_ values of params.m4 are names.  This file puts nothing out.


t_fail(TEXT)
  Stop m4 with the template's place and TEXT.

m4_define({|t_fail|}, {|m4_errprint(m4___program__:m4___file__:m4___line__: {|$1|}
)m4_m4exit(1)|})


t_need(NAME...)
  Stop unless each NAME is defined; the first line of a template.
  t_need({|MODEL_D|}, {|PLAN_CTAS|})

m4_define({|t_need|}, {|m4_ifdef({|$1|}, {||}, {|t_fail({|$1 is not in params.m4|})|})m4_dnl
m4_ifelse({|$#|}, {|1|}, {||}, {|t_need(m4_shift($@))|})|})


t_assert(EXPRESSION)
  Stop unless the integer EXPRESSION is true.
  t_assert({|PLAN_WARPS <= 31|})

m4_define({|t_assert|}, {|m4_ifelse(m4_eval($1), {|0|}, {|t_fail({|assertion $1|})|})|})


t_if(CONDITION, TEXT, ELSE)
  TEXT when the integer CONDITION is true, else ELSE.

m4_define({|t_if|}, {|m4_ifelse(m4_eval($1), {|0|}, {|$3|}, {|$2|})|})


t_for(NAME, FROM, TO, BODY)
  BODY for NAME = FROM .. TO; none when FROM > TO.  NAME is a word in capitals.

m4_define({|t_for|}, {|m4_ifelse(m4_eval(($2) <= ($3)), {|1|}, {|m4_dnl
m4_pushdef({|$1|}, m4_eval($2))t_for_loop({|$1|}, m4_eval($3), {|$4|})m4_popdef({|$1|})|})|})
m4_define({|t_for_loop|}, {|$3{||}m4_ifelse($1, $2, {||}, {|m4_define({|$1|}, m4_incr($1))t_for_loop({|$1|}, $2, {|$3|})|})|})


t_2d(N)
  N with at least two digits: 7 -> 07.

m4_define({|t_2d|}, {|m4_format({|%02d|}, $1)|})


t_note(TEXT)
  A remark of the emitted file with values in it.

m4_define({|t_note|}, {|m4_changecom()// $1{||}m4_changecom(//)|})


t_section(TITLE)
  A ruled heading of the emitted file.

m4_define({|t_section|}, {|t_note({|---- $1 |}m4_translit(m4_format({|%*s|}, m4_eval(80 - m4_len({|$1|})), {||}), {| |}, {|-|}))|})


t_stage
  Before the function of a layer's stage: it exists once and is called, or each layer has it inline.

m4_define({|t_stage|}, {|static __device__ t_if(PLAN_UNROLL == 2, {|__forceinline__|}, {|__noinline__|})|})


t_lap(STAGE)
  In a plan with timing: the cycles since the last lap are STAGE's.

m4_define({|t_lap|}, {|t_if(PLAN_TIMING, {| lap(LAP_$1);|})|})


t_x(WHICH)
  x behind O (WHICH 0) or behind DOWN (1), an expression: one place for both where no other CTA writes it.

m4_define({|t_x|}, {|t_if(PLAN_CLUSTER > 1, {|S->x[$1]|}, {|S->x[0]|})|})


t_shared(TYPE, NAME)
  The CTA's shared memory as NAME, an array of TYPE: NAME->member is how to use it.

m4_define({|t_shared|}, {|t_if(PLAN_HOST, {|#define $2 (($1 *)mkhost_now->shared)|}, {|extern __shared__ $1 $2[];|})|})

PLAN_VEC_AT(LAYER, VECTOR)   floats from args.vec to VECTOR of LAYER
PLAN_KV_AT(LAYER)            elements from args.kv to LAYER
  The plan's 64-bit offsets, one macro each in params.m4.
  PLAN_VEC_AT(7, BIAS)

m4_define({|PLAN_VEC_AT|}, {|m4_indir({|PLAN_VEC_AT_$2_|}m4_eval($1))|})
m4_define({|PLAN_KV_AT|}, {|m4_indir({|PLAN_KV_AT_|}m4_eval($1))|})

t_class(WHAT, CLASS)         a number of the plan's CLASS of groups; SHARE: the arguments of share()
  t_class(FIRST, 1)

m4_define({|t_class|}, {|m4_indir({|PLAN_CLASS_$1_|}m4_eval($2))|})

m4_divert(0)m4_dnl
