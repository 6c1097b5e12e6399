package dictionary

import (
	"context"
	"errors"
	"fmt"

	"holdfast/rafs/convert"
	"holdfast/rafs/image"
	"holdfast/rafs/oci"
)

// maxImages is how many images one dictionary may have: more than a bootstrap could list blobs of.
const maxImages = 256

// A Dictionary is a number of opened images.
type Dictionary struct{ images []*image.Image }

// Open opens the images that refs name, in the forms that package image takes. Errors are those of image.Open.
func Open(ctx context.Context, refs []string, o image.Options) (*Dictionary, error) {
	if len(refs) > maxImages {
		return nil, fmt.Errorf("chunk dictionary: %d images, at most %d are possible", len(refs), maxImages)
	}
	d := &Dictionary{}
	for _, ref := range refs {
		i, err := image.Open(ctx, ref, o)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("chunk dictionary: %w", err), d.Close())
		}
		d.images = append(d.images, i)
	}
	return d, nil
}

// Blobs returns the images' blobs for convert.Options, in the order of the images. They can be used until Close.
func (d *Dictionary) Blobs() (blobs []convert.DictionaryBlob) {
	for _, i := range d.images {
		var at oci.Reference
		if r, err := oci.ParseReference(i.Ref); err == nil { // of a bare bootstrap it is none
			at = r
		}
		for _, b := range i.Blobs {
			blobs = append(blobs, convert.DictionaryBlob{Image: i.Ref, Info: b.Info, Table: b.Table, Source: b.Source, Repo: at.Name})
		}
	}
	return blobs
}

// Close closes the images.
func (d *Dictionary) Close() error {
	var errs []error
	for _, i := range d.images {
		errs = append(errs, i.Close())
	}
	return errors.Join(errs...)
}
