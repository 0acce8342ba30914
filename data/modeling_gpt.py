"""
What data/export.py lays beside model.py, so that transformers' AutoModelForCausalLM opens any GPT of this project. It
is copied, with a line for each mixer that has a file of its own, and nothing here imports it.
"""
import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .model import GPT, NO_CACHE, Cache, GPTConfig, add_mixer # noqa: F401  the mixers' lines need add_mixer
# the mixers' files


class ModelConfig(PretrainedConfig):
    """gpt: the fields of GPTConfig; the others are what transformers and evaluation harnesses look for."""
    model_type = 'gpt_with_mixers'

    def __init__(self, gpt=None, **more):
        self.gpt = gpt or {}
        super().__init__(**more)


class Past:
    """What generate hands from one token to the next: a Cache of model.py."""
    is_compileable = False

    def __init__(self):
        self.cache = Cache()

    def get_seq_length(self, layer=0):
        return self.cache.length

    def reorder_cache(self, rows):
        self.cache.reorder(rows)


class ModelForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ModelConfig
    base_model_prefix = 'gpt'
    _is_stateful = True # what was read cannot be taken back
    accepts_loss_kwargs = False # the loss is the mean of the micro-batch: whoever accumulates divides it

    def __init__(self, config):
        super().__init__(config)
        self.gpt, self.new = GPT(GPTConfig(**config.gpt)), [] # in a list, it is no part of the module
        self._tied_weights_keys = {}
        if self.gpt.config.tie_weights:
            self._tied_weights_keys = {'gpt.transformer.wte.weight': 'gpt.lm_head.weight'}
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def _init_weights(self, module):
        """Weights come from the file. Buffers that are no part of it, such as rope's, are those of a new model."""
        for name in module._non_persistent_buffers_set:
            if not self.new:
                with torch.device('cpu'):
                    self.new.append(GPT(self.gpt.config))
            where = next(path for path, m in self.gpt.named_modules() if m is module)
            old, new = getattr(module, name), getattr(self.new[0].get_submodule(where), name)
            setattr(module, name, new.to(new.device if old.is_meta else old.device, old.dtype))

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def forward(self, input_ids, attention_mask=None, labels=None, past_key_values=None, cache=None, use_cache=None,
                **_):
        """
        input_ids (B, T), labels (B, T) with -100 for none -> logits (B, T, V), and with labels the loss. Padding
        belongs on the right: on the left it would be read as text.
        """
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask[:, 0].all():
            raise ValueError("padding on the left would be read as text: pad on the right, or generate for prompts of "
                             "one length at a time")
        past = cache if cache is not None else past_key_values
        if past is None and use_cache:
            past = Past()
        logits = self.gpt.lm_head(self.gpt.hidden(input_ids, NO_CACHE if past is None else past.cache))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return ModelOutput(**{k: v for k, v in dict(loss=loss, logits=logits).items() if v is not None},
                           **dict(past_key_values=past) if past is not None else {})

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, cache=None, attention_mask=None,
                                      use_cache=True, **_):
        past = cache if cache is not None else past_key_values
        done = past.get_seq_length() if past is not None else 0
        return dict(input_ids=input_ids[:, done:], past_key_values=past, use_cache=use_cache,
                    attention_mask=attention_mask if done == 0 else None)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *more, **named):
        past = outputs.get('past_key_values')
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *more, **named)
        return model_kwargs | (dict(past_key_values=past) if past is not None else {})
