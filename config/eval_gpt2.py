# OpenAI's GPT-2 124M on the whole validation split of OpenWebText; the larger ones: --init_from=gpt2-medium, gpt2-large,
# gpt2-xl. nanoGPT measured 3.12, 2.84, 2.67, 2.54 on its random windows; not measured here.

dataset = 'openwebtext'
init_from = 'gpt2'
eval_only = True
batch_size = 8
