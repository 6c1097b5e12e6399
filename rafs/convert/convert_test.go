package convert

import (
	"context"
	"path/filepath"
	"testing"
)

func TestSmoke(t *testing.T) {
	res, err := Run(context.Background(), Options{Source: "tar:../../../shared/fixtures/nydus/tar/all-entry-type.tar", Dest: "oci:" + filepath.Join(t.TempDir(), "out:v1")})
	t.Logf("%+v %v", res, err)
	if err != nil {
		t.Fatal(err)
	}
}
