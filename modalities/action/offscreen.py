"""How MuJoCo draws without a screen: import this before it. Mesa's EGL where nothing else was asked for."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")  # needs neither a display nor a GPU
os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
DRIVER = (
    "for an OpenGL driver on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri libgles2, "
    "or MUJOCO_GL=osmesa and libosmesa6"
)
