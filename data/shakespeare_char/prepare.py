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
from data.writer import Writer, cuts, summarize

input_file = '' # take the text from this file instead of downloading it
test_fraction = 0.0 # fraction of the training text to seal: tests/compare.py --confirm alone reads it [0, 1)
out = 'shakespeare_char' # dataset to write: a name in data/, or a folder
configure(globals())

explain_errors()
text = tiny_shakespeare(input_file)
sealed, held_out = cuts(len(text), 0.1, test_fraction)
tokenizer = CharTokenizer.from_text([text])
with Writer(dataset_folder(out), tokenizer, test_fraction=test_fraction) as writer:
    writer.write('train', tokenizer.encode(text[:sealed]))
    writer.write('test', tokenizer.encode(text[sealed:held_out]))
    writer.write('val', tokenizer.encode(text[held_out:]))
summarize(writer, 'config/train_shakespeare_char.py', out)
