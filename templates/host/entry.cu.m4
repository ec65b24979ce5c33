t_if(PLAN_HOST, {|t_section({|Where libmkhost enters, and how long the arguments are|})

#define MKHOST_ENTRY(kernel, type) \
    extern "C" { \
    void mkhost_##kernel(void **args) { kernel(*(const type *)args[0]); } \
    extern const unsigned int mkhost_##kernel##_bytes = sizeof(type); \
    }
MKHOST_ENTRY(mk_pack, mk_pack_args)
MKHOST_ENTRY(mk_decode, mk_args)
MKHOST_ENTRY(mk_prefill, mk_args)
|})m4_dnl
