"""Weight-only quantization: conversion without calibration, and quantization while loading."""
