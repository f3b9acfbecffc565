"""A pytest plug-in: lets the official mmsegmentation be imported beside mmcv-lite, which has no compiled operators."""

import sys

from tests.integrations.conftest import Uncompiled

sys.modules["mmcv._ext"] = Uncompiled("mmcv._ext")
import mmcv.ops  # noqa: E402, F401

del sys.modules["mmcv._ext"]  # mmengine asks where its file is
