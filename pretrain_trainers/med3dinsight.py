"""Med3DInsight's trainer, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer as Med3DInsightPretrainer
