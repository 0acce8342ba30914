# Evaluates OpenAI's GPT-2 124M on the whole validation split of OpenWebText. Larger models: --init_from=gpt2-medium,
# gpt2-large or gpt2-xl. nanoGPT reports 3.12, 2.84, 2.67 and 2.54 on random windows. Not measured here.
# Prepare: python data/openwebtext/prepare.py

dataset = 'openwebtext'
init_from = 'gpt2'
eval_only = True
batch_size = 8
