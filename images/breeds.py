"""What the animals of `images.synthetic` look like: shapes by class, and the coats of every breed.

A trait is a number or a tuple of numbers; a breed overrides its class, and a class the defaults.
"""

# Geometry is in head units: the head is about one unit in radius, u points right and v down.
SHAPES = {
    "cat": dict(
        skull=(0.93, 0.84), cheek=(1.00, 0.60, 0.27), snout=(0.50, 0.40, 0.58),
        ear=(0.60, -0.50, 0.92, 0.40), ear_lean=0.24, ear_round=0.0, flop=0.0,
        eye=(0.42, -0.05, 0.215, 0.165), eye_slant=0.16, pupil=(0.065, 0.15), iris_mix=0.5,
        pad=(0.155, 0.50, 0.215, 0.165), chin=(0.22, 0.16, 0.70), nose=(0.095, 0.075, 0.36), whisker=0.75,
    ),
    "dog": dict(
        size=1.08, skull=(0.77, 0.82), cheek=(0.70, 0.58, 0.26), snout=(0.47, 0.52, 0.60),
        ear=(0.74, -0.50, 0.92, 0.31), ear_lean=-0.20, ear_round=1.0, flop=1.0,
        eye=(0.35, -0.15, 0.145, 0.115), eye_slant=-0.06, pupil=(0.075, 0.075),
        pad=(0.20, 0.62, 0.27, 0.25), chin=(0.27, 0.18, 0.90), nose=(0.19, 0.135, 0.43), whisker=0.12,
    ),
    "wild": dict(
        skull=(0.86, 0.86), cheek=(0.94, 0.62, 0.30), snout=(0.48, 0.42, 0.64),
        ear=(0.68, -0.55, 0.44, 0.32), ear_lean=0.40, ear_round=1.0, flop=0.0,
        eye=(0.38, -0.13, 0.150, 0.100), eye_slant=0.22, pupil=(0.055, 0.055),
        pad=(0.19, 0.58, 0.25, 0.20), chin=(0.25, 0.18, 0.82), nose=(0.165, 0.105, 0.42), whisker=0.55,
    ),
}  # fmt: skip

_FOX_SHAPE = dict(
    skull=(0.80, 0.72), cheek=(1.00, 0.46, 0.20), snout=(0.31, 0.52, 0.56), ear=(0.55, -0.42, 0.98, 0.35),
    ear_lean=0.20, ear_round=0.12, eye=(0.36, -0.06, 0.135, 0.095), pad=(0.11, 0.62, 0.18, 0.17),
    chin=(0.16, 0.14, 0.82), nose=(0.105, 0.085, 0.52),
)  # fmt: skip
_PRICKED = dict(flop=0.0, ear=(0.52, -0.48, 0.88, 0.31), ear_lean=0.12, ear_round=0.1, cheek=(0.82, 0.56, 0.22))

# Coat colours are RGB in [0, 1]: the base, the markings, and the pale parts (muzzle, chest, blaze).
BREEDS = {
    "cat": (
        dict(base=(0.56, 0.47, 0.36), dark=(0.20, 0.15, 0.11), pale=(0.86, 0.80, 0.70), tabby=0.9,
             muzzle=0.8, iris=(0.62, 0.66, 0.22), skin=(0.72, 0.42, 0.38)),
        dict(base=(0.85, 0.54, 0.26), dark=(0.62, 0.30, 0.10), pale=(0.97, 0.88, 0.74), tabby=0.8,
             muzzle=0.85, iris=(0.78, 0.58, 0.18), skin=(0.88, 0.56, 0.52)),
        dict(base=(0.45, 0.48, 0.53), dark=(0.30, 0.32, 0.37), pale=(0.60, 0.63, 0.67), tabby=0.15,
             muzzle=0.5, iris=(0.86, 0.60, 0.16), skin=(0.30, 0.30, 0.34)),
        dict(base=(0.13, 0.12, 0.13), dark=(0.06, 0.05, 0.06), pale=(0.94, 0.93, 0.91), blaze=0.95,
             muzzle=0.97, iris=(0.58, 0.74, 0.32), skin=(0.86, 0.56, 0.56)),
        dict(base=(0.86, 0.78, 0.66), dark=(0.24, 0.17, 0.14), pale=(0.90, 0.84, 0.74), mask=0.95,
             muzzle=0.0, dark_ear=1.0, iris=(0.38, 0.62, 0.90), skin=(0.26, 0.18, 0.17)),
        dict(base=(0.93, 0.91, 0.87), dark=(0.28, 0.23, 0.21), pale=(0.97, 0.96, 0.94), patch=0.95,
             muzzle=0.7, iris=(0.48, 0.68, 0.40), skin=(0.90, 0.60, 0.58)),
    ),
    "dog": (
        dict(base=(0.82, 0.62, 0.36), dark=(0.62, 0.41, 0.20), pale=(0.92, 0.79, 0.58), dark_ear=0.6,
             muzzle=0.5),
        dict(base=(0.62, 0.38, 0.20), dark=(0.38, 0.21, 0.11), pale=(0.96, 0.94, 0.90), blaze=0.95,
             muzzle=0.95, dark_ear=0.9),
        dict(base=(0.27, 0.21, 0.19), dark=(0.11, 0.09, 0.08), pale=(0.42, 0.35, 0.31), muzzle=0.5,
             iris=(0.52, 0.32, 0.14)),
        dict(base=(0.33, 0.34, 0.37), dark=(0.14, 0.14, 0.16), pale=(0.95, 0.95, 0.95), muzzle=0.97,
             brows=0.9, face=0.85, widow=0.8, iris=(0.45, 0.70, 0.92), eye_slant=0.14, **_PRICKED),
        dict(base=(0.94, 0.93, 0.90), dark=(0.13, 0.11, 0.10), pale=(0.97, 0.96, 0.94), spots=0.95,
             muzzle=0.5, dark_ear=0.85, spot_size=0.75),
        dict(base=(0.93, 0.90, 0.85), dark=(0.46, 0.28, 0.16), pale=(0.97, 0.96, 0.93), patch=0.95,
             muzzle=0.6, dark_ear=0.9),
        dict(base=(0.19, 0.15, 0.14), dark=(0.08, 0.07, 0.07), pale=(0.74, 0.44, 0.20), muzzle=0.92,
             brows=0.95, face=0.45, **_PRICKED),
    ),
    "wild": (
        dict(base=(0.83, 0.43, 0.15), dark=(0.20, 0.11, 0.08), pale=(0.97, 0.93, 0.87), face=0.95,
             muzzle=0.9, dark_ear=0.85, iris=(0.80, 0.52, 0.16), **_FOX_SHAPE),
        dict(base=(0.88, 0.53, 0.20), dark=(0.09, 0.06, 0.05), pale=(0.97, 0.94, 0.89), tiger=1.0,
             muzzle=0.95, brows=0.9, face=0.65, dark_ear=0.7, iris=(0.80, 0.68, 0.28)),
        dict(base=(0.84, 0.65, 0.36), dark=(0.14, 0.09, 0.06), pale=(0.96, 0.91, 0.80), spots=0.95,
             muzzle=0.9, tear=0.55, spot_size=0.50, iris=(0.66, 0.68, 0.30)),
        dict(base=(0.78, 0.58, 0.33), dark=(0.36, 0.20, 0.10), pale=(0.93, 0.84, 0.68), mane=1.0,
             muzzle=0.85, iris=(0.80, 0.55, 0.18)),
        dict(base=(0.47, 0.44, 0.41), dark=(0.20, 0.18, 0.17), pale=(0.90, 0.87, 0.81), face=0.75,
             muzzle=0.85, brows=0.5, widow=0.6, iris=(0.86, 0.68, 0.22),
             **{**_FOX_SHAPE, "snout": (0.38, 0.52, 0.58), "skull": (0.82, 0.78), "cheek": (0.98, 0.54, 0.22),
                "ear": (0.56, -0.46, 0.80, 0.32), "pad": (0.14, 0.62, 0.22, 0.20),
                "nose": (0.145, 0.105, 0.50)}),
        dict(base=(0.60, 0.58, 0.56), dark=(0.15, 0.14, 0.14), pale=(0.95, 0.94, 0.92), spots=0.8,
             muzzle=0.9, face=0.4, spot_size=0.55, iris=(0.60, 0.74, 0.72)),
    ),
}  # fmt: skip

DEFAULTS = dict(
    tabby=0.0, tiger=0.0, spots=0.0, patch=0.0, mask=0.0, blaze=0.0, face=0.0, brows=0.0, widow=0.0,
    tear=0.0, mane=0.0, muzzle=0.0, dark_ear=0.0, spot_size=0.6, iris_mix=0.0, size=1.0,
    iris=(0.32, 0.18, 0.09), skin=(0.10, 0.08, 0.09),
)  # fmt: skip

IRISES = ((0.58, 0.68, 0.24), (0.80, 0.62, 0.18), (0.42, 0.70, 0.46), (0.45, 0.66, 0.84))
