"""Whisper's decoder on KerasHub's own model with the weights of a CTranslate2 file: transcripts to compare with."""

import keras_hub
import numpy as np

from models.ctranslate2 import read_ctranslate2


def load_decoder(file):
    """A KerasHub WhisperBackbone whose decoder has the file's weights; its encoder keeps random ones."""
    _, arrays = read_ctranslate2(file)
    heads = int(arrays["decoder/num_heads"])
    vocabulary, size = arrays["decoder/embeddings/weight"].shape
    layers = sum(name.endswith("ffn/linear_0/weight") and name.startswith("decoder/") for name in arrays)
    model = keras_hub.models.WhisperBackbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=size,
        intermediate_dim=arrays["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_decoder_sequence_length=arrays["decoder/position_encodings/encodings"].shape[0],
    )

    def dense(layer, kernel, bias):
        layer.kernel.assign(np.asarray(kernel, "float32").T.reshape(layer.kernel.shape))
        if layer.bias is None:
            assert not bias.any()
        else:
            layer.bias.assign(np.asarray(bias, "float32").reshape(layer.bias.shape))

    def norm(layer, name):
        layer.gamma.assign(np.asarray(arrays[f"decoder/{name}/gamma"], "float32"))
        layer.beta.assign(np.asarray(arrays[f"decoder/{name}/beta"], "float32"))

    def parts(name, count):
        pairs = zip(*(np.split(arrays[f"decoder/{name}/{word}"], count) for word in ("weight", "bias")))
        return list(pairs)

    model.token_embedding.embeddings.assign(np.asarray(arrays["decoder/embeddings/weight"], "float32"))
    positions = np.asarray(arrays["decoder/position_encodings/encodings"], "float32")
    model.decoder_embeddings.position_embedding.position_embeddings.assign(positions)
    for number, unit in enumerate(model.decoder_transformer_layers):
        name = f"layer_{number}"
        own, cross = unit._self_attention_layer, unit._cross_attention_layer
        for layer, pair in zip(
            (own._query_dense, own._key_dense, own._value_dense), parts(f"{name}/self_attention/linear_0", 3)
        ):
            dense(layer, *pair)
        dense(own._output_dense, *parts(f"{name}/self_attention/linear_1", 1)[0])
        dense(cross._query_dense, *parts(f"{name}/attention/linear_0", 1)[0])
        for layer, pair in zip((cross._key_dense, cross._value_dense), parts(f"{name}/attention/linear_1", 2)):
            dense(layer, *pair)
        dense(cross._output_dense, *parts(f"{name}/attention/linear_2", 1)[0])
        dense(unit._feedforward_intermediate_dense, *parts(f"{name}/ffn/linear_0", 1)[0])
        dense(unit._feedforward_output_dense, *parts(f"{name}/ffn/linear_1", 1)[0])
        norm(unit._self_attention_layernorm, f"{name}/self_attention/layer_norm")
        norm(unit._cross_attention_layernorm, f"{name}/attention/layer_norm")
        norm(unit._feedforward_layernorm, f"{name}/ffn/layer_norm")
    norm(model.decoder_layer_norm, "layer_norm")
    return model


def greedy(model, states, prompt=(50257, 50362), end=50256, longest=60):
    """Encoder states [1, frames, d] -> the tokens after the prompt up to the end, which is left out."""
    import keras
    import tensorflow as tf

    sequence = keras.Input((None, states.shape[-1]))
    tokens, mask = model.input["decoder_token_ids"], model.input["decoder_padding_mask"]
    x = model.decoder_embeddings_dropout(model.decoder_embeddings(tokens))
    for unit in model.decoder_transformer_layers:
        x = unit(decoder_sequence=x, encoder_sequence=sequence, decoder_padding_mask=mask)
    decoder = keras.Model([sequence, tokens, mask], model.decoder_layer_norm(x))
    step = tf.function(lambda ids, mask: model.token_embedding(decoder([states, ids, mask]), reverse=True))
    ids = np.full((1, longest), end, "int32")
    ids[0, : len(prompt)] = prompt
    for place in range(len(prompt), longest):
        chosen = int(np.argmax(step(ids, (np.arange(longest) < place)[None].astype("int32"))[0, place - 1]))
        if chosen == end:
            break
        ids[0, place] = chosen
    return ids[0, len(prompt) : place].tolist()
