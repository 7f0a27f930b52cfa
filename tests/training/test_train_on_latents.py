import numpy as np

import cache_latents
import train


def test_training_on_latents_follows_training_on_images(class_folder, vae_folder, tmp_path):
    class_folder(tmp_path / "images", images=7, size=(24, 18))
    autoencoder = ["--vae-ckpt", str(vae_folder), "--image-size", "16", "--num-workers", "0", "--device", "cpu"]
    cache_latents.main([str(tmp_path / "images"), str(tmp_path / "z"), "--shard-size", "4", *autoencoder])
    losses = {}
    for data in ("images", "z"):
        train.main(
            [
                *("--target", "predictor", "--data-path", str(tmp_path / data), *autoencoder),
                *("--hidden-size", "32", "--depth", "1", "--num-heads", "4", "--lr", "1e-3"),
                *("--global-batch-size", "6", "--steps", "4", "--log-every", "1", "--sample-every", "0"),
                *("--results-dir", str(tmp_path / "results"), "--note", data),
            ]
        )
        log = next((tmp_path / "results").glob(f"*-{data}/log.txt")).read_text()
        losses[data] = [float(w.split("=")[1]) for w in log.split() if w.startswith("loss=")]
    assert len(losses["z"]) == 4
    np.testing.assert_allclose(losses["z"], losses["images"], rtol=1e-3)
