"""
Tinyshakespeare as characters, with nanoGPT's ids and split: 1,115,394 characters, 65 different ones. The first nine
tenths (1,003,854) are for training, the rest (111,540) for validation. Downloads 1.1 MB once.

    python data/shakespeare_char/prepare.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.shakespeare_char.text import tiny_shakespeare
from data.tokenizers import CharTokenizer
from data.tokens import dataset_folder
from data.writer import Writer, summarize

input_file = '' # take the text from this file instead of downloading it
out = 'shakespeare_char' # dataset to write: a name in data/, or a folder
configure(globals())

explain_errors()
text = tiny_shakespeare(input_file)
cut = int(len(text) * 0.9)
tokenizer = CharTokenizer.from_text([text])
with Writer(dataset_folder(out), tokenizer) as writer:
    writer.write('train', tokenizer.encode(text[:cut]))
    writer.write('val', tokenizer.encode(text[cut:]))
summarize(writer, 'config/train_shakespeare_char.py', out)
