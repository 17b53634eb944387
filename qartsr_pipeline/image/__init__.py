"""Pictures without the network: conversion, resampling, tiles, colour and alpha. Plain functions on tensors."""
