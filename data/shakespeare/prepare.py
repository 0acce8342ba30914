"""
Tinyshakespeare as GPT-2 tokens, with nanoGPT's split: 301,966 training and 36,059 validation tokens. Shares the
1.1 MB download with shakespeare_char. tiktoken downloads GPT-2's vocabulary once.

    python data/shakespeare/prepare.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.shakespeare_char.text import tiny_shakespeare
from data.tokenizers import TiktokenTokenizer
from data.tokens import dataset_folder
from data.writer import Writer, summarize

input_file = '' # take the text from this file instead of downloading it
out = 'shakespeare' # dataset to write: a name in data/, or a folder
configure(globals())

explain_errors()
text = tiny_shakespeare(input_file)
cut = int(len(text) * 0.9)
tokenizer = TiktokenTokenizer('gpt2')
with Writer(dataset_folder(out), tokenizer) as writer:
    writer.write('train', tokenizer.encode(text[:cut]))
    writer.write('val', tokenizer.encode(text[cut:]))
summarize(writer, 'config/finetune_shakespeare.py', out)
