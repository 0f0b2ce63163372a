"""M3Ret's trainers, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.m3ret.mae.trainer import M3RetMAEPretrainer as M3RetMAEPretrainer
from nnssl_plugin.methods.m3ret.simdino.trainer import M3RetSimDINOPretrainer as M3RetSimDINOPretrainer
