# A UNet of one level: a block at full length, two at half of it, a block at full length.
# Use after config/shakespeare_small.py; reaches 1.879 over the whole validation split (one seed).
out_dir = 'out-unet'
unet_layers = (1,)
n_layer = 2
mlp_ratio = 3.5 # pays for merging and expanding
