"""
OpenWebText (huggingface.co/datasets/Skylion007/openwebtext) as GPT-2 tokens: 8,013,769 documents, about 9.04 billion
tokens. Every 2000th document is held out, about 4.5 million tokens. Needs 18 GB of disk, for the tokens only.

The text is streamed, which takes hours. After an interruption, the same command continues where it stopped.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --max_tokens=100_000_000     the first 100 million tokens

Then: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
This runs data/hub/prepare.py with these settings; its other settings work here too.
"""
import runpy
import sys
from pathlib import Path

sys.argv[1:1] = ['--source=Skylion007/openwebtext', '--out=openwebtext']
runpy.run_path(str(Path(__file__).resolve().parents[1] / 'hub/prepare.py'), run_name='__main__')
