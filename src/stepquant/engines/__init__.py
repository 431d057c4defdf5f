"""What takes a quantized denoiser's calls: captured calls, OpenVINO, or the faster of the two."""
